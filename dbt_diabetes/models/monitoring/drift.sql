{#- How far each feature, and the score, of a window lies from the champion's reference. -#}
with shares as (

    select
        *,
        rows / nullif(sum(rows) over (partition by check_id, window_name, feature), 0)
            as window_share
    from {{ ref('int_drift__bins') }}

),

floored as (

    select
        *,
        greatest(cast(window_share as double precision), {{ var('drift_epsilon') }}) as actual,
        greatest(reference_share, {{ var('drift_epsilon') }}) as expected
    from shares

),

figures as (

    select
        check_id,
        window_name,
        feature,
        cast(sum(rows) as bigint) as rows,
        {{ same_in_any_order('sum((actual - expected) * ln(actual / expected))') }} as psi,
        cast(sum(missing_rows) / nullif(sum(rows), 0) as double precision) as missing_share,
        {{ same_in_any_order('sum(reference_missing_share)') }} as missing_share_reference,
        cast(sum(new_rows) / nullif(sum(rows), 0) as double precision) as new_category_share
    from floored
    group by check_id, window_name, feature

)

select
    figures.check_id,
    windows.checked_at,
    figures.window_name,
    windows.model_version,
    figures.feature,
    figures.rows,
    case when figures.rows >= {{ var('drift_min_rows') }} then figures.psi end as psi,
    figures.missing_share,
    figures.missing_share_reference,
    figures.new_category_share,
    figures.rows >= {{ var('drift_min_rows') }} and figures.psi > {{ var('drift_limit') }}
        as drifted
from figures
inner join {{ source('drift_inputs', 'windows') }} as windows
    on figures.check_id = windows.check_id and figures.window_name = windows.window_name
