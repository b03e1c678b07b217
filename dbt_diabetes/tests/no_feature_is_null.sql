{#-
    Catches a lookup without a match or a count without its median. The contracts of clean_data refuse
    a null too, but table by table, when others may be replaced already.
-#}
select encounter_id
from {{ ref('int_encounters__features') }}
where
    encounter_id is null
    {% for column in feature_columns() %}
    or {{ column }} is null
    {% endfor %}
