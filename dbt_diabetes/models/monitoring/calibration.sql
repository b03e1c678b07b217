{#- What was predicted and what came, by bin of the reference's scores, of known outcomes. -#}
select
    windows.check_id,
    windows.window_name,
    reference.bin,
    count(*) as rows,
    {{ same_in_any_order('avg(window_rows.probability)') }} as predicted,
    cast(avg(window_rows.observed) as double precision) as observed
from {{ source('drift_inputs', 'windows') }} as windows
inner join {{ source('drift_inputs', 'window_rows') }} as window_rows
    on
        windows.check_id = window_rows.check_id
        and windows.window_name = window_rows.window_name
inner join {{ source('drift_inputs', 'reference') }} as reference
    on
        windows.model_version = reference.model_version
        and reference.feature = '(score)'
        and window_rows.probability >= reference.lower_bound
        and window_rows.probability < reference.upper_bound
where window_rows.observed is not null
group by windows.check_id, windows.window_name, reference.bin
