{#- The ranges of the seed, one row a category (1 to 999): a diagnosis is looked up by key. -#}
with digits as (

    {% for digit in range(10) %}
    select {{ digit }} as digit
    {{ 'union all' if not loop.last }}
    {% endfor %}

),

numbers as (

    select hundreds.digit * 100 + tens.digit * 10 + ones.digit as category
    from digits as hundreds
    cross join digits as tens
    cross join digits as ones

)

select
    cast(numbers.category as {{ dbt.type_string() }}) as icd9_key,
    icd9_groups.icd9_group
from numbers
inner join {{ ref('icd9_groups') }} as icd9_groups
    on numbers.category between icd9_groups.first_category and icd9_groups.last_category

union all

-- Supplementary codes: factors influencing health status (V), external causes of injury (E).
select
    'V' as icd9_key,
    'Other' as icd9_group
union all
select
    'E' as icd9_key,
    'Other' as icd9_group
union all
select
    'Missing' as icd9_key,
    'Missing' as icd9_group
