{#-
    Missing values. A missing category is a value of its own, because that it is missing tells
    something; a count that a caller of the model leaves out is imputed later from statistics.
    The split is decided here, by patient, before anything is fitted.
-#}
{{ config(materialized='view') }}

with encounters as (

    select
        *,
        substr(md5(cast(patient_nbr as {{ dbt.type_string() }})), 1, 8) as patient_hash
    from {{ ref('stg_diabetes_130us__encounters') }}

)

select
    encounter_id,
    patient_nbr,
    {{ assign_split('patient_hash') }} as split,
    coalesce(race, 'Unknown') as race,
    case when gender in ('Female', 'Male') then gender else 'Unknown' end as gender,
    age_band,
    {{ flag('weight_band is not null') }} as weight_measured,
    coalesce(admission_type_id, 6) as admission_type_id,
    coalesce(discharge_disposition_id, 18) as discharge_disposition_id,
    coalesce(admission_source_id, 17) as admission_source_id,
    {% for column in numeric_features() %}
    {{ column }},
    {% endfor %}
    coalesce(payer_code, 'Unknown') as payer_code,
    coalesce(medical_specialty, 'Unknown') as medical_specialty,
    coalesce({{ icd9_category('diag_1') }}, 'Missing') as diag_1_category,
    coalesce({{ icd9_category('diag_2') }}, 'Missing') as diag_2_category,
    coalesce({{ icd9_category('diag_3') }}, 'Missing') as diag_3_category,
    -- 250.0 is diabetes without complication; the digit after the point names the complication.
    {% for diagnosis in ['diag_1', 'diag_2', 'diag_3'] %}
    {{ flag(diagnosis ~ " like '250.%' and " ~ diagnosis ~ " not like '250.0%'") }}
        as {{ diagnosis }}_is_complication,
    {% endfor %}
    coalesce(max_glu_serum, 'None') as max_glu_serum,
    coalesce(a1c_result, 'None') as a1c_result,
    {% for drug in drugs() %}
    coalesce({{ drug }}, 'No') as {{ drug }},
    {% endfor %}
    coalesce(medication_change, 'No') as medication_change,
    coalesce(diabetes_medication, 'No') as diabetes_medication,
    readmitted,
    first_load_id,
    last_load_id
from encounters
