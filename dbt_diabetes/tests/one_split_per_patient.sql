{#-
    Catches a split made by row: then a model is judged on patients it has learnt (38 % of the test
    encounters, if split at random).
-#}
select
    patient_nbr,
    min(split) as one_split,
    max(split) as another_split
from {{ ref('int_encounters__features') }}
group by patient_nbr
having min(split) <> max(split)
