{#- Each value of each feature with its rows: a thousandth of what all else is computed from. -#}
with listed as (

    select
        windows.check_id,
        windows.window_name,
        windows.feature_names ->> cast(element.place - 1 as integer) as feature,
        element.content #>> '{}' as text_value,
        jsonb_typeof(element.content) = 'number' as is_number
    from {{ source('drift_inputs', 'windows') }} as windows
    inner join {{ source('drift_inputs', 'window_rows') }} as window_rows
        on
            windows.check_id = window_rows.check_id
            and windows.window_name = window_rows.window_name
    cross join
        lateral jsonb_array_elements(window_rows.features) with ordinality
            as element (content, place)

    union all

    select
        check_id,
        window_name,
        '(score)' as feature,
        cast(probability as text) as text_value,
        true as is_number
    from {{ source('drift_inputs', 'window_rows') }}

),

counted as (

    select
        check_id,
        window_name,
        feature,
        text_value,
        is_number,
        count(*) as rows
    from listed
    where text_value is not null
    group by check_id, window_name, feature, text_value, is_number

)

select
    check_id,
    window_name,
    feature,
    text_value,
    case when is_number then cast(text_value as double precision) end as number,
    rows
from counted
