{#-
    Catches a raw code that no seed lists: it would become Unknown or Other without a word. What
    stands for a missing value is a code of its own and is not looked for.
-#}
with codes as (

    select distinct
        'age_midpoints' as seed,
        age_band as code
    from {{ ref('int_encounters__cleaned') }}
    {%- for seed, column in [
        ('admission_types', 'admission_type_code'),
        ('admission_sources', 'admission_source_code'),
        ('discharge_dispositions', 'discharge_code'),
        ('specialty_groups', 'medical_specialty'),
    ] %}
    union all
    select distinct
        '{{ seed }}' as seed,
        cast({{ column }} as {{ dbt.type_string() }}) as code
    from {{ ref('int_encounters__features') }}
    {%- endfor %}
    union all
    select
        'icd9_groups' as seed,
        {{ icd9_key('category') }} as code
    from (
        {%- for n in [1, 2, 3] %}
        select distinct diag_{{ n }}_category as category
        from {{ ref('int_encounters__features') }}
        {{ 'union all' if not loop.last }}
        {%- endfor %}
    ) as categories

),

listed as (
    {% for seed, column in [
        ('age_midpoints', 'age_band'),
        ('admission_types', 'admission_type_id'),
        ('admission_sources', 'admission_source_id'),
        ('discharge_dispositions', 'discharge_disposition_id'),
        ('specialty_groups', 'medical_specialty'),
    ] %}
    select
        '{{ seed }}' as seed,
        cast({{ column }} as {{ dbt.type_string() }}) as code
    from {{ ref(seed) }}
    union all
    {%- endfor %}
    select
        'icd9_groups' as seed,
        icd9_key as code
    from {{ ref('int_icd9_lookup') }}

)

select distinct
    codes.seed,
    codes.code
from codes
left join listed on codes.seed = listed.seed and codes.code = listed.code
where
    listed.code is null
    and codes.code is not null
    and not (codes.seed = 'specialty_groups' and codes.code = 'Unknown')
