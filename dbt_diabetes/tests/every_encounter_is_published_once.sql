{#-
    Catches an encounter that stands in no table, in two, or in none of the raw ones: train +
    validation + test + excluded = raw, without overlap.
-#}
with rows_found as (

    select
        encounter_id,
        1 as in_raw,
        0 as in_clean_data
    from {{ ref('stg_diabetes_130us__encounters') }}
    {%- for model in [
        'diabetes_train', 'diabetes_validation', 'diabetes_test', 'diabetes_excluded'
    ] %}
    union all
    select
        encounter_id,
        0 as in_raw,
        1 as in_clean_data
    from {{ ref(model) }}
    {%- endfor %}

)

select
    encounter_id,
    sum(in_raw) as rows_in_raw,
    sum(in_clean_data) as rows_in_clean_data
from rows_found
group by encounter_id
having sum(in_raw) <> 1 or sum(in_clean_data) <> 1
