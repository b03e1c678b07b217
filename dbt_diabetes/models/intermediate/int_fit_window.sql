{#-
    Up to which load training rows take part in fitting. Kept from run to run, so that rows added
    later move no statistic and full batches never change; `--full-refresh` opens it anew, and so
    does a table whose rows were all replaced.
-#}
{{ config(materialized='incremental', unique_key='window_id', unlogged=false) }}

select
    1 as window_id,
    max(first_load_id) as fitted_through_load_id
from {{ ref('int_encounters__encoded') }}
where is_training_row = 1
{% if is_incremental() %}
having
    not exists (
        select 1
        from {{ ref('int_encounters__encoded') }} as encoded
        inner join {{ this }} as fit_window
            on encoded.first_load_id <= fit_window.fitted_through_load_id
        where encoded.is_training_row = 1
    )
{% endif %}
