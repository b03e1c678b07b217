{#- The features as a model sees them, with their encounter; audited before clean_data is made. -#}
select
    encounter_id,
    patient_nbr,
    split,
    exclusion_reason,
    first_load_id,
    last_load_id,
    readmitted,
    readmitted_within_30_days,
    {% for column in encoded_features() %}
    {{ column }},
    {% endfor %}
    age_midpoint,
    {% for column in numeric_features() %}
    {{ column }},
    {% endfor %}
    number_outpatient + number_emergency + number_inpatient as visits_before,
    number_emergency + number_inpatient as acute_visits_before,
    cast(num_medications as {{ type_double() }}) / time_in_hospital as medications_per_day,
    cast(num_lab_procedures as {{ type_double() }}) / time_in_hospital as lab_procedures_per_day
from {{ ref('int_encounters__clipped') }}
