{#-
    Every bin of the reference with its share and the window's rows. Bins that hold little of the
    reference stand together in one, -1: of them a window of a thousand rows holds a handful, and
    their noise would add up. There too is what falls into no bin at all.
-#}
with missing as (

    {% for feature, value in missing_values().items() %}
    select
        '{{ feature }}' as feature,
        '{{ value }}' as missing_value
    {{ 'union all' if not loop.last }}
    {% endfor %}

),

expected as (

    select
        windows.check_id,
        windows.window_name,
        reference.feature,
        reference.kind,
        reference.lower_bound,
        reference.upper_bound,
        reference.level,
        reference.share,
        case
            when reference.kind = 'other' or reference.share < {{ var('drift_pool_share') }} then -1
            else reference.bin
        end as bin
    from {{ source('drift_inputs', 'windows') }} as windows
    inner join {{ source('drift_inputs', 'reference') }} as reference
        on windows.model_version = reference.model_version

),

features as (

    select
        expected.check_id,
        expected.window_name,
        expected.feature,
        bool_or(expected.kind = 'level') as is_nominal,
        max(missing.missing_value) as missing_value
    from expected
    left join missing on expected.feature = missing.feature
    group by expected.check_id, expected.window_name, expected.feature

),

placed as (

    select
        observed.check_id,
        observed.window_name,
        observed.feature,
        observed.text_value,
        observed.rows,
        expected.bin,
        expected.bin is null as is_new
    from {{ ref('int_drift__values') }} as observed
    inner join features
        on
            observed.check_id = features.check_id
            and observed.window_name = features.window_name
            and observed.feature = features.feature
            and features.is_nominal
    left join expected
        on
            observed.check_id = expected.check_id
            and observed.window_name = expected.window_name
            and observed.feature = expected.feature
            and observed.text_value = expected.level

    union all

    select
        observed.check_id,
        observed.window_name,
        observed.feature,
        observed.text_value,
        observed.rows,
        expected.bin,
        false as is_new
    from {{ ref('int_drift__values') }} as observed
    inner join features
        on
            observed.check_id = features.check_id
            and observed.window_name = features.window_name
            and observed.feature = features.feature
            and not features.is_nominal
    left join expected
        on
            observed.check_id = expected.check_id
            and observed.window_name = expected.window_name
            and observed.feature = expected.feature
            and observed.number >= expected.lower_bound
            and observed.number < expected.upper_bound

),

both_sides as (

    select
        check_id,
        window_name,
        feature,
        bin,
        share as reference_share,
        level as text_value,
        0 as rows,
        false as is_new
    from expected
    union all
    select
        check_id,
        window_name,
        feature,
        coalesce(bin, -1) as bin,
        0 as reference_share,
        text_value,
        rows,
        is_new
    from placed

)

select
    both_sides.check_id,
    both_sides.window_name,
    both_sides.feature,
    both_sides.bin,
    sum(both_sides.reference_share) as reference_share,
    sum(both_sides.rows) as rows,
    case
        when features.is_nominal
            then coalesce(sum(both_sides.rows) filter (where both_sides.is_new), 0)
    end as new_rows,
    case
        when features.missing_value is not null then coalesce(
            sum(both_sides.rows) filter (where both_sides.text_value = features.missing_value), 0
        )
    end as missing_rows,
    case
        when features.missing_value is not null then coalesce(
            sum(both_sides.reference_share) filter (
                where both_sides.text_value = features.missing_value
            ), 0
        )
    end as reference_missing_share
from both_sides
inner join features
    on
        both_sides.check_id = features.check_id
        and both_sides.window_name = features.window_name
        and both_sides.feature = features.feature
group by
    both_sides.check_id,
    both_sides.window_name,
    both_sides.feature,
    both_sides.bin,
    features.is_nominal,
    features.missing_value
