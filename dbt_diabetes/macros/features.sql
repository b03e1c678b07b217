{#- The diabetic medicines, in the publisher's order. -#}
{% macro drugs() -%}
    {{ return([
        'metformin', 'repaglinide', 'nateglinide', 'chlorpropamide', 'glimepiride',
        'acetohexamide', 'glipizide', 'glyburide', 'tolbutamide', 'pioglitazone',
        'rosiglitazone', 'acarbose', 'miglitol', 'troglitazone', 'tolazamide', 'examide',
        'citoglipton', 'insulin', 'glyburide_metformin', 'glipizide_metformin',
        'glimepiride_pioglitazone', 'metformin_rosiglitazone', 'metformin_pioglitazone',
    ]) }}
{%- endmacro %}

{#- Counts that are imputed with the training median and, where a rule says so, clipped. -#}
{% macro numeric_features() -%}
    {{ return([
        'time_in_hospital', 'num_lab_procedures', 'num_procedures', 'num_medications',
        'number_outpatient', 'number_emergency', 'number_inpatient', 'number_diagnoses',
    ]) }}
{%- endmacro %}

{#- The ICD-9 groups of Strack et al., as they end the name of a feature. -#}
{% macro icd9_groups() -%}
    {{ return([
        'Circulatory', 'Respiratory', 'Digestive', 'Diabetes', 'Injury', 'Musculoskeletal',
        'Genitourinary', 'Neoplasms', 'Other',
    ]) }}
{%- endmacro %}

{#- 1 where the condition holds, else 0 (also where it is null). -#}
{% macro flag(condition) -%}
    case when {{ condition }} then 1 else 0 end
{%- endmacro %}

{#- Null where the publisher wrote `?`. The text `None` stays: it means "not measured". -#}
{% macro missing_as_null(column) -%}
    nullif({{ column }}, '?')
{%- endmacro %}

{#- How many of the diabetic medicines stand at one of the given doses. -#}
{% macro count_drugs(doses) -%}
    {%- for drug in drugs() %}
        {{ '+ ' if not loop.first }}{{ flag(drug ~ " in ('" ~ doses | join("', '") ~ "')") }}
    {%- endfor %}
{%- endmacro %}

{#-
    Category of an ICD-9 code: what stands before the point (`250.83` -> `250`, `V45` -> `V45`),
    without leading zeros, which the publisher leaves out (`038.9` -> `38`).
-#}
{% macro icd9_category(code) -%}
    ltrim(
        case
            when {{ dbt.position("'.'", code) }} > 0
                then substr({{ code }}, 1, {{ dbt.position("'.'", code) }} - 1)
            else {{ code }}
        end,
        '0'
    )
{%- endmacro %}

{#- Key into icd9_lookup: `V` and `E` stand for all codes of their kind. -#}
{% macro icd9_key(category) -%}
    case
        when {{ category }} like 'V%' then 'V'
        when {{ category }} like 'E%' then 'E'
        else {{ category }}
    end
{%- endmacro %}

{#- Split of a patient: the first 32 bits of an md5 as hex text, cut at 70 % and 85 %. -#}
{% macro assign_split(patient_hash) -%}
    case
        when {{ bytewise(patient_hash) }} < 'b3333333' then 'train'
        when {{ bytewise(patient_hash) }} < 'd9999999' then 'validation'
        else 'test'
    end
{%- endmacro %}

{#- Features that are final once encoded: everything but the counts and what is made of them. -#}
{% macro encoded_features() -%}
    {%- set diagnoses = [] -%}
    {%- for group in icd9_groups() -%}
        {%- do diagnoses.append('has_' ~ (group | lower) ~ '_diagnosis') -%}
    {%- endfor -%}
    {{ return([
        'race', 'gender', 'is_female', 'weight_measured', 'admission_type_code',
        'admission_type_group', 'admission_source_code', 'admission_source_group',
        'discharge_code', 'discharge_group', 'payer_code', 'medical_specialty',
        'specialty_group', 'diag_1_category', 'diag_1_group', 'diag_2_category',
        'diag_2_group', 'diag_3_category', 'diag_3_group',
    ] + diagnoses + [
        'diabetes_complications', 'max_glu_serum', 'glucose_level', 'a1c_result',
        'a1c_measured', 'a1c_level', 'a1c_response', 'medication_changed',
        'takes_diabetes_medication', 'insulin', 'insulin_steady', 'insulin_up',
        'insulin_down', 'takes_metformin', 'takes_repaglinide', 'takes_glimepiride',
        'takes_glipizide', 'takes_glyburide', 'takes_pioglitazone',
        'takes_rosiglitazone', 'diabetes_medications', 'doses_raised', 'doses_lowered',
    ]) }}
{%- endmacro %}

{#- All features, in the order of the columns of clean_data. -#}
{% macro feature_columns() -%}
    {{ return(encoded_features() + ['age_midpoint'] + numeric_features() + [
        'visits_before', 'acute_visits_before', 'medications_per_day', 'lab_procedures_per_day',
    ]) }}
{%- endmacro %}

{#- Body of the three split tables: keys, outcome, then every feature. -#}
{% macro select_split(split, with_batch=false) -%}
select
    encounter_id,
    patient_nbr,
{%- if with_batch %}
    cast(ceil(row_number() over (
        order by
            first_load_id,
            {{ bytewise('md5(cast(encounter_id as ' ~ dbt.type_string() ~ '))') }}
    ) / {{ var('batch_size') }}.0) as integer) as batch_id,
{%- endif %}
    first_load_id,
    last_load_id,
    readmitted,
    readmitted_within_30_days
{%- for column in feature_columns() %},
    {{ column }}
{%- endfor %}
from {{ ref('int_encounters__features') }}
where split = '{{ split }}' and exclusion_reason is null
{%- endmacro %}
