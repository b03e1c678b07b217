{#-
    By feature, what dbt writes where the publisher's field is missing. Features that a missing field
    leaves no mark in (a count gets the training median) and those made of these are left out.
-#}
{% macro missing_values() -%}
    {{ return({
        'race': 'Unknown', 'gender': 'Unknown', 'admission_type_code': '6',
        'discharge_code': '18', 'admission_source_code': '17', 'payer_code': 'Unknown',
        'medical_specialty': 'Unknown', 'diag_1_category': 'Missing',
        'diag_2_category': 'Missing', 'diag_3_category': 'Missing',
    }) }}
{%- endmacro %}

{#- A sum of floating-point numbers without the digits that depend on the order of the rows. -#}
{% macro same_in_any_order(figure) -%}
    cast(round(cast({{ figure }} as numeric), 9) as {{ type_double() }})
{%- endmacro %}

{#- A check that is made again may find nothing where it found something: what it wrote must go. -#}
{% macro forget_this_check(relation) -%}
    {% if execute and model.config.materialized == 'incremental' and load_relation(relation) -%}
        delete from {{ relation }}
        where check_id in (select check_id from {{ source('drift_inputs', 'windows') }})
    {%- endif %}
{%- endmacro %}
