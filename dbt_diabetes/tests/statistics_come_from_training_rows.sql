{#-
    Catches statistics fitted on validation, test, excluded or later rows. Everything is found again
    from the rows themselves, another way: by cumulative counts, as the smallest value with the wanted
    share of rows at or below it. It runs beside the tests of the features, not before them.
-#}
-- depends_on: {{ ref('int_encounters__features') }}
{%- set quantiles = var('clip_quantiles') %}
with training_rows as (

    select
        {% for column in numeric_features() %}
        encoded.{{ column }},
        {% endfor %}
        encoded.age_midpoint
    from {{ ref('int_encounters__encoded') }} as encoded
    where
        encoded.split = 'train'
        and encoded.exclusion_reason is null
        and encoded.first_load_id <= (
            select max(fit_window.fitted_through_load_id)
            from {{ ref('int_fit_window') }} as fit_window
        )

),

refitted as (

    {% for column in numeric_features() + ['age_midpoint'] %}
    {% set bounds = quantiles.get(column, [none, none]) %}
    select
        {% for name, share in [('median', 0.5), ('low', bounds[0]), ('high', bounds[1])] %}
        {% if share is none %}
        cast(null as integer) as refitted_{{ name }},
        {% else %}
        min(
            case
                when rows_up_to >= cast({{ share }} as {{ type_double() }}) * all_rows
                    then feature_value
            end
        ) as refitted_{{ name }},
        {% endif %}
        {% endfor %}
        '{{ column }}' as feature
    from (
        select
            {{ column }} as feature_value,
            sum(count(*)) over (order by {{ column }}) as rows_up_to,
            sum(count(*)) over () as all_rows
        from training_rows
        where {{ column }} is not null
        group by {{ column }}
    ) as cumulated
    {{ 'union all' if not loop.last }}
    {% endfor %}

),

stored as (

    {% for column in numeric_features() %}
    select
        '{{ column }}' as feature,
        {{ column }}_median as stored_median,
        {{ column }}_low as stored_low,
        {{ column }}_high as stored_high
    from {{ ref('int_statistics') }}
    union all
    {% endfor %}
    select
        'age_midpoint' as feature,
        age_midpoint_median as stored_median,
        cast(null as integer) as stored_low,
        cast(null as integer) as stored_high
    from {{ ref('int_statistics') }}

),

compared as (

    select
        refitted.feature,
        refitted.refitted_median,
        refitted.refitted_low,
        refitted.refitted_high,
        stored.stored_median,
        stored.stored_low,
        stored.stored_high
    from refitted
    left join stored on refitted.feature = stored.feature
    union all
    select
        'rows' as feature,
        (select count(*) from training_rows) as refitted_median,
        (
            select max(fit_window.fitted_through_load_id)
            from {{ ref('int_fit_window') }} as fit_window
        ) as refitted_low,
        cast(null as integer) as refitted_high,
        max(fitted_rows) as stored_median,
        max(fitted_through_load_id) as stored_low,
        cast(null as integer) as stored_high
    from {{ ref('int_statistics') }}

)

select *
from compared
where
    refitted_median is distinct from stored_median
    or refitted_low is distinct from stored_low
    or refitted_high is distinct from stored_high
