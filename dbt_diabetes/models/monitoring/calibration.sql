{#- What was predicted and what came, by bin of the reference's scores, of known outcomes. -#}
select
    windows.check_id,
    windows.window_name,
    reference.bin,
    count(*) as rows,
    {{ same_in_any_order('avg(outcomes.probability)') }} as predicted,
    cast(avg(outcomes.observed) as double precision) as observed
from {{ source('drift_inputs', 'windows') }} as windows
inner join {{ source('drift_inputs', 'window_outcomes') }} as outcomes
    on
        windows.check_id = outcomes.check_id
        and windows.window_name = outcomes.window_name
inner join {{ source('drift_inputs', 'reference') }} as reference
    on
        windows.model_version = reference.model_version
        and reference.feature = '(score)'
        and outcomes.probability >= reference.lower_bound
        and outcomes.probability < reference.upper_bound
group by windows.check_id, windows.window_name, reference.bin
