{#-
    Catches a discharge code whose exclusion is missing from the seed, or stands there wrongly. The
    codes are written out once more, because the seed is what is being checked: died 11, 19, 20, 21,
    hospice 13, 14.
-#}
select
    encounter_id,
    discharge_code,
    exclusion_reason
from {{ ref('int_encounters__features') }}
where
    coalesce(exclusion_reason, 'none') <> case
        when discharge_code in (11, 19, 20, 21) then 'died'
        when discharge_code in (13, 14) then 'hospice'
        else 'none'
    end
