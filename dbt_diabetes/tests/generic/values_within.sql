{#-
    Catches a value outside a closed list: a misspelt group in a seed, a level that does not exist.
    All columns in one scan; a row counts for the first column that it breaks. Null is left to the
    contract.
-#}
{% test values_within(model, allowed) %}
    {%- set ns = namespace(rules=[]) -%}
    {%- for column, values in allowed.items() -%}
        {%- set literals = [] -%}
        {%- for value in values -%}
            {%- do literals.append(value if value is number else "'" ~ value ~ "'") -%}
        {%- endfor -%}
        {%- do ns.rules.append([column, column ~ ' not in (' ~ literals | join(', ') ~ ')']) -%}
    {%- endfor -%}

select
    case
    {%- for column, is_broken in ns.rules %}
        when {{ is_broken }} then '{{ column }}'
    {%- endfor %}
    end as broken_column,
    count(*) as broken_rows
from {{ model }}
where
    {%- for _, is_broken in ns.rules %}
    {{ 'or ' if not loop.first }}{{ is_broken }}
    {%- endfor %}
group by 1
{% endtest %}
