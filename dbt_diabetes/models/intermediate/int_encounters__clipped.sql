{#- Counts imputed with the training median, then clipped to the training bounds where set. -#}
{{ config(materialized='view') }}
{%- set quantiles = var('clip_quantiles') %}

select
    encoded.encounter_id,
    encoded.patient_nbr,
    encoded.split,
    encoded.exclusion_reason,
    encoded.first_load_id,
    encoded.last_load_id,
    encoded.readmitted,
    encoded.readmitted_within_30_days,
    {% for column in encoded_features() %}
    encoded.{{ column }},
    {% endfor %}
    {% for column in numeric_features() %}
    {% set imputed = 'coalesce(encoded.' ~ column ~ ', statistics.' ~ column ~ '_median)' %}
    {% if column in quantiles %}
    case
        when {{ imputed }} < statistics.{{ column }}_low then statistics.{{ column }}_low
        when {{ imputed }} > statistics.{{ column }}_high then statistics.{{ column }}_high
        else {{ imputed }}
    end as {{ column }},
    {% else %}
    {{ imputed }} as {{ column }},
    {% endif %}
    {% endfor %}
    coalesce(encoded.age_midpoint, statistics.age_midpoint_median) as age_midpoint
from {{ ref('int_encounters__encoded') }} as encoded
cross join {{ ref('int_statistics') }} as statistics
