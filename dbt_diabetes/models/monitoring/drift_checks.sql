{#- One row a window of a check: whether there was enough to look at, and what was found. -#}
with counted as (

    select
        check_id,
        window_name,
        count(*) as rows
    from {{ source('drift_inputs', 'window_rows') }}
    group by check_id, window_name

),

calibrated as (

    select
        check_id,
        window_name,
        cast(sum(rows) as bigint) as rows,
        {{ same_in_any_order('sum(rows * abs(predicted - observed)) / sum(rows)') }} as error
    from {{ ref('calibration') }}
    group by check_id, window_name

),

drifted as (

    select
        check_id,
        window_name,
        cast(sum({{ flag('drifted') }}) as integer) as features
    from {{ ref('drift') }}
    group by check_id, window_name

)

select
    windows.check_id,
    windows.window_name,
    windows.checked_at,
    windows.model_version,
    windows.begins_at,
    windows.loads_after,
    windows.load_id,
    coalesce(counted.rows, 0) as rows,
    coalesce(calibrated.rows, 0) as labelled_rows,
    case when calibrated.rows >= {{ var('drift_min_rows') }} then calibrated.error end
        as calibration_error,
    coalesce(drifted.features, 0) as drifted_features,
    coalesce(counted.rows, 0) >= {{ var('drift_min_rows') }} as enough_rows,
    cast({{ var('drift_limit') }} as double precision) as drift_limit
from {{ source('drift_inputs', 'windows') }} as windows
left join counted
    on windows.check_id = counted.check_id and windows.window_name = counted.window_name
left join calibrated
    on windows.check_id = calibrated.check_id and windows.window_name = calibrated.window_name
left join drifted
    on windows.check_id = drifted.check_id and windows.window_name = drifted.window_name
