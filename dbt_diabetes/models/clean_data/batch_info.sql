{#- One row a training batch; the hash changes when any stored value of the batch does. -#}
{%- set hashed_columns = ['encounter_id', 'patient_nbr', 'readmitted'] + feature_columns() %}
select
    batch_id,
    cast(count(*) as integer) as rows,
    cast(count(distinct patient_nbr) as integer) as patients,
    cast(sum(readmitted_within_30_days) as integer) as positives,
    count(*) = {{ var('batch_size') }} as is_full,
    min(first_load_id) as first_load_id,
    max(last_load_id) as last_load_id,
    {{ content_hash(hashed_columns, 'encounter_id') }} as content_hash
from {{ ref('diabetes_train') }}
group by batch_id
