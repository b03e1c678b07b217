{#- Shares lie between 0 and 1, a PSI is not below 0, and what has drifted has enough rows. -#}
{% test drift_figures_are_possible(model) %}
select *
from {{ model }}
where
    psi < -1e-9
    or missing_share not between 0 and 1
    or missing_share_reference not between 0 and 1 + 1e-9
    or new_category_share not between 0 and 1
    or (drifted and psi is null)
{% endtest %}
