{#-
    Catches a wrong or shifted cut of the hash, and a hash that is not uniform. Half a percentage
    point is allowed at the size of the real data; fewer patients scatter more.
-#}
with encounters as (

    select
        patient_nbr,
        split,
        exclusion_reason
    from {{ ref('int_encounters__features') }}

),

patients as (

    select count(*) as patients
    from (select distinct patient_nbr from encounters) as distinct_patients

),

expected as (

    select
        'train' as split,
        0.70 as expected_share
    union all
    select
        'validation' as split,
        0.15 as expected_share
    union all
    select
        'test' as split,
        0.15 as expected_share

),

eligible as (

    select
        split,
        count(*) as encounters
    from encounters
    where exclusion_reason is null
    group by split

),

total as (

    select sum(encounters) as encounters
    from eligible

)

select
    expected.split,
    expected.expected_share,
    coalesce(eligible.encounters, 0) / total.encounters as actual_share,
    patients.patients
from expected
left join eligible on expected.split = eligible.split
cross join total
cross join patients
where
    abs(coalesce(eligible.encounters, 0) / total.encounters - expected.expected_share)
    > 0.005 * greatest(1.0, sqrt(71518.0 / nullif(patients.patients, 0)))
