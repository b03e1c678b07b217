{#-
    Catches a split that takes encounters of patients who died or went to a hospice: they can't be
    readmitted, and that lends a model .007 of AUROC.
-#}
{%- for split in ['train', 'validation', 'test'] %}
select
    '{{ split }}' as split,
    encounter_id,
    discharge_code
from {{ ref('diabetes_' ~ split) }}
where discharge_code in (11, 13, 14, 19, 20, 21)
{{ 'union all' if not loop.last }}
{%- endfor %}
