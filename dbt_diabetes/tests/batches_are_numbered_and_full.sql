{#-
    Catches a gap in the numbers of batches, a batch of more than batch_size rows, and one before the
    last that is not full.
-#}
with batches as (

    select
        batch_id,
        rows,
        is_full,
        row_number() over (order by batch_id) as expected_id,
        count(*) over () as batches
    from {{ ref('batch_info') }}

)

select *
from batches
where
    batch_id <> expected_id
    or rows not between 1 and {{ var('batch_size') }}
    or (expected_id < batches and rows <> {{ var('batch_size') }})
    or is_full <> (rows = {{ var('batch_size') }})
