{#-
    Catches an id used as a feature, by name and under any other name: a model learns single
    encounters from it (the raw id alone adds .006 of AUROC that no new encounter has). An id has as
    many values as rows, so 5,000 rows show it, whichever they are.
-#}
{%- set ids = ['encounter_id', 'patient_nbr', 'first_load_id', 'last_load_id'] %}
with sample_rows as (

    select *
    from {{ ref('int_encounters__features') }}
    limit 5000 -- noqa: AM09

),

counted as (

    select
    {%- for column in feature_columns() %}
        count(distinct {{ column }}) as {{ column }}{{ ',' if not loop.last }}
    {%- endfor %}
    from sample_rows

)

{% for column in feature_columns() -%}
select
    '{{ column }}' as feature,
    {{ column }} as distinct_values
from counted
where {{ 'true' if column in ids or column.endswith('_id') else column ~ ' > 1000' }}
{{ 'union all' if not loop.last }}
{% endfor %}
