{#- Encounters that can't be followed by a readmission, so that every raw row stands somewhere. -#}
select
    encounter_id,
    patient_nbr,
    split,
    exclusion_reason,
    discharge_code,
    readmitted,
    first_load_id,
    last_load_id
from {{ ref('int_encounters__features') }}
where exclusion_reason is not null
