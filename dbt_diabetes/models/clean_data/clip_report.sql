{#-
    How many rows of each split every bound touches. It needs no features, but it waits for them,
    because what is tested there decides whether anything in clean_data is replaced.
-#}
-- depends_on: {{ ref('int_encounters__features') }}
{%- for column in var('clip_quantiles') %}
select
    '{{ column }}' as feature,
    encoded.split,
    max(statistics.{{ column }}_low) as lower_bound,
    max(statistics.{{ column }}_high) as upper_bound,
    cast(count(*) as integer) as rows,
    cast(sum({{ flag('encoded.' ~ column ~ ' < statistics.' ~ column ~ '_low') }}) as integer)
        as rows_raised,
    cast(sum({{ flag('encoded.' ~ column ~ ' > statistics.' ~ column ~ '_high') }}) as integer)
        as rows_lowered,
    max(encoded.{{ column }}) as largest_value
from {{ ref('int_encounters__encoded') }} as encoded
cross join {{ ref('int_statistics') }} as statistics
where encoded.exclusion_reason is null
group by encoded.split
{{ 'union all' if not loop.last }}
{%- endfor %}
