{#-
    How often encounters with each value of a feature are followed by a readmission within 30 days,
    with a 95 % interval (Wilson's, which holds for few rows too). Train rows only: a look at
    validation or test is a choice made on them.

    dbt show --select readmission_by_feature --limit 50 --vars 'feature: a1c_response'
-#}
{%- set feature = var('feature', 'discharge_group') -%}
{%- if feature not in feature_columns() -%}
    {%- do exceptions.raise_compiler_error(feature ~ ' is no feature; one of ' ~ feature_columns()) -%}
{%- endif -%}
with counted as (

    select
        {{ feature }} as feature_value,
        cast(count(*) as {{ type_double() }}) as encounters,
        cast(sum(readmitted_within_30_days) as {{ type_double() }}) as readmitted
    from {{ ref('diabetes_train') }}
    group by {{ feature }}

),

rates as (

    select
        feature_value,
        encounters,
        readmitted,
        readmitted / encounters as rate,
        sum(readmitted) over () / sum(encounters) over () as overall_rate,
        -- The square of 1.96, over the rows: Wilson's interval is written with it.
        3.8416 / encounters as z2
    from counted

)

select
    feature_value,
    cast(encounters as integer) as encounters,
    cast(100 * rate as decimal(5, 2)) as percent_readmitted,
    cast(
        100 * (rate + z2 / 2 - sqrt(z2 * (rate * (1 - rate) + z2 / 4))) / (1 + z2) as decimal(5, 2)
    ) as percent_low,
    cast(
        100 * (rate + z2 / 2 + sqrt(z2 * (rate * (1 - rate) + z2 / 4))) / (1 + z2) as decimal(5, 2)
    ) as percent_high,
    cast(rate / overall_rate as decimal(6, 2)) as lift
from rates
order by rate desc
