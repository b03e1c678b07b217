{#- Catches a label turned round, or an outcome outside the three that are published. -#}
select
    encounter_id,
    readmitted,
    readmitted_within_30_days
from {{ ref('int_encounters__features') }}
where
    readmitted not in ('<30', '>30', 'NO')
    or readmitted_within_30_days <> case when readmitted = '<30' then 1 else 0 end
