{#-
    What every training batch was seen to hold, kept from run to run: the memory behind the promise
    that a full batch never changes. `source_rows` and `last_load_id` describe all encounters of the
    loads that the batch draws on, not only its own: a correction that moves one out of training, or
    a refresh that deletes some, rightly moves the rows after them.
-#}
{{ config(materialized='incremental', unique_key=['batch_id', 'content_hash'], unlogged=false) }}
{% set statistics_columns = ['fitted_through_load_id', 'fitted_rows', 'age_midpoint_median'] %}
{% for column in numeric_features() %}
{% do statistics_columns.extend([column ~ '_median', column ~ '_low', column ~ '_high']) %}
{% endfor %}

with loads as (

    select
        first_load_id as load_id,
        count(*) as encounters,
        max(last_load_id) as last_load_id
    from {{ ref('int_encounters__features') }}
    group by first_load_id

),

newest_loads as (

    select
        batch_id,
        max(first_load_id) as load_id
    from {{ ref('diabetes_train') }}
    group by batch_id

),

origins as (

    select
        newest_loads.batch_id,
        cast(sum(loads.encounters) as bigint) as source_rows,
        max(loads.last_load_id) as last_load_id
    from newest_loads
    inner join loads on newest_loads.load_id >= loads.load_id
    group by newest_loads.batch_id

),

statistics as (

    select {{ content_hash(statistics_columns, 'fitted_rows') }} as statistics_hash
    from {{ ref('int_statistics') }}

)

select
    batch_info.batch_id,
    batch_info.rows,
    batch_info.is_full,
    batch_info.content_hash,
    origins.source_rows,
    origins.last_load_id,
    statistics.statistics_hash
from {{ ref('batch_info') }} as batch_info
inner join origins on batch_info.batch_id = origins.batch_id
cross join statistics
