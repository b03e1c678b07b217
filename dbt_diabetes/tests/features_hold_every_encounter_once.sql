{#-
    Catches a join that loses encounters or doubles them (a lookup with a key twice) on the way from
    raw to features. Count and sum are enough before publishing; which encounter it is,
    every_encounter_is_published_once tells.
-#}
with raw as (

    select
        count(*) as encounters,
        sum(encounter_id) as sum_of_ids
    from {{ ref('stg_diabetes_130us__encounters') }}

),

features as (

    select
        count(*) as encounters,
        sum(encounter_id) as sum_of_ids
    from {{ ref('int_encounters__features') }}

)

select
    raw.encounters as encounters_in_raw,
    features.encounters as encounters_in_features,
    raw.sum_of_ids as sum_in_raw,
    features.sum_of_ids as sum_in_features
from raw
cross join features
where
    raw.encounters <> features.encounters
    or raw.sum_of_ids is distinct from features.sum_of_ids
