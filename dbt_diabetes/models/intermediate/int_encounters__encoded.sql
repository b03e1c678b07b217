{#-
    Encoding, row by row: text to groups (lookups), orders (ordinal), yes/no (binary) and, where
    the steps of a dose have no order, one column a value (one-hot).
-#}
{%- set diagnosis_groups = [] %}
select
    encounters.encounter_id,
    encounters.patient_nbr,
    encounters.split,
    discharge_dispositions.exclusion_reason,
    {{ flag("encounters.split = 'train' and discharge_dispositions.exclusion_reason is null") }}
        as is_training_row,
    encounters.first_load_id,
    encounters.last_load_id,
    encounters.readmitted,
    {{ flag("encounters.readmitted = '<30'") }} as readmitted_within_30_days,

    -- patient
    encounters.race,
    encounters.gender,
    {{ flag("encounters.gender = 'Female'") }} as is_female,
    age_midpoints.age_midpoint,
    encounters.weight_measured,

    -- admission
    encounters.admission_type_id as admission_type_code,
    coalesce(admission_types.admission_type_group, 'Unknown') as admission_type_group,
    encounters.admission_source_id as admission_source_code,
    coalesce(admission_sources.admission_source_group, 'Unknown') as admission_source_group,
    encounters.discharge_disposition_id as discharge_code,
    coalesce(discharge_dispositions.discharge_group, 'Unknown') as discharge_group,
    encounters.payer_code,
    encounters.medical_specialty,
    case
        when encounters.medical_specialty = 'Unknown' then 'Unknown'
        else coalesce(specialty_groups.specialty_group, 'Other')
    end as specialty_group,
    {% for column in numeric_features() %}
    encounters.{{ column }},
    {% endfor %}

    -- diagnoses
    {% for n in [1, 2, 3] %}
    {% set diagnosis_group = "coalesce(icd9_" ~ n ~ ".icd9_group, 'Other')" %}
    {% do diagnosis_groups.append(diagnosis_group) %}
    encounters.diag_{{ n }}_category,
    {{ diagnosis_group }} as diag_{{ n }}_group,
    {% endfor %}
    {% for group in icd9_groups() %}
    {{ flag("'" ~ group ~ "' in (" ~ diagnosis_groups | join(', ') ~ ")") }}
        as has_{{ group | lower }}_diagnosis,
    {% endfor %}
    encounters.diag_1_is_complication + encounters.diag_2_is_complication
    + encounters.diag_3_is_complication as diabetes_complications,

    -- laboratory
    encounters.max_glu_serum,
    case encounters.max_glu_serum
        when 'Norm' then 1 when '>200' then 2 when '>300' then 3 else 0
    end as glucose_level,
    encounters.a1c_result,
    {{ flag("encounters.a1c_result <> 'None'") }} as a1c_measured,
    case encounters.a1c_result
        when 'Norm' then 1 when '>7' then 2 when '>8' then 3 else 0
    end as a1c_level,
    -- The four groups of Strack et al. 2014, section 2.3.
    case
        when encounters.a1c_result = 'None' then 'Not measured'
        when encounters.a1c_result <> '>8' then 'Not high'
        when encounters.medication_change = 'Ch' then 'High, medication changed'
        else 'High, medication not changed'
    end as a1c_response,

    -- medicines
    {{ flag("encounters.medication_change = 'Ch'") }} as medication_changed,
    {{ flag("encounters.diabetes_medication = 'Yes'") }} as takes_diabetes_medication,
    encounters.insulin,
    {{ flag("encounters.insulin = 'Steady'") }} as insulin_steady,
    {{ flag("encounters.insulin = 'Up'") }} as insulin_up,
    {{ flag("encounters.insulin = 'Down'") }} as insulin_down,
    {% for drug in [
        'metformin', 'repaglinide', 'glimepiride', 'glipizide', 'glyburide', 'pioglitazone',
        'rosiglitazone',
    ] %}
    {{ flag("encounters." ~ drug ~ " <> 'No'") }} as takes_{{ drug }},
    {% endfor %}
    {{ count_drugs(['Steady', 'Up', 'Down']) }} as diabetes_medications,
    {{ count_drugs(['Up']) }} as doses_raised,
    {{ count_drugs(['Down']) }} as doses_lowered
from {{ ref('int_encounters__cleaned') }} as encounters
left join {{ ref('age_midpoints') }} as age_midpoints
    on encounters.age_band = age_midpoints.age_band
left join {{ ref('admission_types') }} as admission_types
    on encounters.admission_type_id = admission_types.admission_type_id
left join {{ ref('admission_sources') }} as admission_sources
    on encounters.admission_source_id = admission_sources.admission_source_id
left join {{ ref('discharge_dispositions') }} as discharge_dispositions
    on encounters.discharge_disposition_id = discharge_dispositions.discharge_disposition_id
left join {{ ref('specialty_groups') }} as specialty_groups
    on encounters.medical_specialty = specialty_groups.medical_specialty
{% for n in [1, 2, 3] %}
left join {{ ref('int_icd9_lookup') }} as icd9_{{ n }}
    on {{ icd9_key('encounters.diag_' ~ n ~ '_category') }} = icd9_{{ n }}.icd9_key
{% endfor %}
