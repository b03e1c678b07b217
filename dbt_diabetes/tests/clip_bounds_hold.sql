{#-
    Catches a feature outside its bounds, and one that is cut although no rule names it: clipping at
    three sigma takes number_inpatient, the strongest predictor, from 21 down to 4.
-#}
{%- set clipped = var('clip_quantiles') %}
with ranges as (

    select
        {% for column in numeric_features() %}
        min({{ column }}) as {{ column }}_min,
        max({{ column }}) as {{ column }}_max,
        {% endfor %}
        count(*) as encounters
    from {{ ref('int_encounters__features') }}

),

uncut as (

    select
        {% for column in numeric_features() if column not in clipped %}
        min({{ column }}) as {{ column }}_min,
        max({{ column }}) as {{ column }}_max,
        {% endfor %}
        count(*) as encounters
    from {{ ref('int_encounters__encoded') }}

)

{% for column in numeric_features() -%}
select
    '{{ column }}' as feature,
    ranges.{{ column }}_min as smallest,
    ranges.{{ column }}_max as largest
from ranges
{% if column in clipped %}
cross join {{ ref('int_statistics') }} as statistics
where
    ranges.{{ column }}_min < statistics.{{ column }}_low
    or ranges.{{ column }}_max > statistics.{{ column }}_high
{% else %}
cross join uncut
where
    ranges.{{ column }}_min <> uncut.{{ column }}_min
    or ranges.{{ column }}_max <> uncut.{{ column }}_max
{% endif %}
{{ 'union all' if not loop.last }}
{% endfor %}
