{#- What differs between databases, one dispatched macro each. -#}

{#- A quantile that is a value of the column (the smallest with that share of rows at or below). -#}
{% macro quantile(column, share) -%}
    {{ return(adapter.dispatch('quantile')(column, share)) }}
{%- endmacro %}

{% macro default__quantile(column, share) -%}
    percentile_disc({{ share }}) within group (order by {{ column }})
{%- endmacro %}

{#- A double-precision floating-point type. -#}
{% macro type_double() -%}
    {{ return(adapter.dispatch('type_double')()) }}
{%- endmacro %}

{% macro default__type_double() -%}
    double
{%- endmacro %}

{% macro postgres__type_double() -%}
    double precision
{%- endmacro %}

{#- Text compared byte by byte, whatever the database's locale is. -#}
{% macro bytewise(column) -%}
    {{ return(adapter.dispatch('bytewise')(column)) }}
{%- endmacro %}

{% macro default__bytewise(column) -%}
    {{ column }}
{%- endmacro %}

{% macro postgres__bytewise(column) -%}
    {{ column }} collate "C"
{%- endmacro %}

{#- Hash of a group's rows: md5 over the md5 of each row, in the order of a unique key. -#}
{% macro content_hash(columns, key) -%}
    {{ return(adapter.dispatch('content_hash')(columns, key)) }}
{%- endmacro %}

{% macro postgres__content_hash(columns, key) -%}
    md5(string_agg(md5(concat_ws('|', {{ columns | join(', ') }})), '' order by {{ key }}))
{%- endmacro %}
