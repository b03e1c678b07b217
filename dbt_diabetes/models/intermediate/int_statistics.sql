{#- What is fitted: medians for imputation and bounds for clipping, from training rows only. -#}
{%- set quantiles = var('clip_quantiles') %}
select
    max(fit_window.fitted_through_load_id) as fitted_through_load_id,
    count(*) as fitted_rows,
    {% for column in numeric_features() %}
    {% set bounds = quantiles.get(column) %}
    {{ quantile('encoded.' ~ column, 0.5) }} as {{ column }}_median,
    {% if bounds %}
    {{ quantile('encoded.' ~ column, bounds[0]) }} as {{ column }}_low,
    {{ quantile('encoded.' ~ column, bounds[1]) }} as {{ column }}_high,
    {% else %}
    cast(null as integer) as {{ column }}_low,
    cast(null as integer) as {{ column }}_high,
    {% endif %}
    {% endfor %}
    {{ quantile('encoded.age_midpoint', 0.5) }} as age_midpoint_median
from {{ ref('int_encounters__encoded') }} as encoded
cross join {{ ref('int_fit_window') }} as fit_window
where
    encoded.is_training_row = 1
    and encoded.first_load_id <= fit_window.fitted_through_load_id
