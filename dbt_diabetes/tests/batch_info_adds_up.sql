{#- Catches a batch_info that does not belong to the diabetes_train beside it. -#}
with counted as (

    select
        batch_id,
        count(*) as rows,
        sum(readmitted_within_30_days) as positives,
        min(first_load_id) as first_load_id,
        max(last_load_id) as last_load_id
    from {{ ref('diabetes_train') }}
    group by batch_id

)

select
    coalesce(counted.batch_id, batch_info.batch_id) as batch_id,
    counted.rows as rows_counted,
    batch_info.rows as rows_told,
    counted.positives as positives_counted,
    batch_info.positives as positives_told
from counted
full outer join {{ ref('batch_info') }} as batch_info on counted.batch_id = batch_info.batch_id
where
    counted.rows is distinct from batch_info.rows
    or counted.positives is distinct from batch_info.positives
    or counted.first_load_id is distinct from batch_info.first_load_id
    or counted.last_load_id is distinct from batch_info.last_load_id
