{#-
    Catches a full batch whose content changed though its source and its statistics did not: an order
    that depends on later rows, or a feature whose SQL was changed. The history forgets nothing: if
    the change is wanted, or was undone, start it anew with
    dbt build --full-refresh --select int_batch_history.
-#}
select
    batch_id,
    source_rows,
    last_load_id,
    count(*) as contents
from {{ ref('int_batch_history') }}
where is_full
group by batch_id, source_rows, last_load_id, statistics_hash
having count(*) > 1
