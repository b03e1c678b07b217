{#-
    For on-run-end: what became of each node, into monitoring.dbt_results, for the exporter.

    One statement and so one transaction. A user who may not write there (one who only reads, say)
    stores nothing and is not disturbed. Of the newest 50 invocations everything is kept; of older
    ones each node's newest result of each status, so that neither what failed is forgotten before it
    runs again, nor when a model was last built. What is no longer in the project is forgotten. Unit
    tests judge the code, not the data, and are not stored.
-#}
{% macro store_results(results) -%}
    {%- if execute and results and target.type == 'postgres' -%}
        {%- set rows = [] -%}
        {%- set others = ['operation', 'unit_test'] -%}
        {%- for result in results if result.node and result.node.resource_type not in others -%}
            {%- set ends = result.timing | map(attribute='completed_at') | select | list -%}
            {%- set values = [
                dbt.string_literal(invocation_id),
                dbt.string_literal(dbt.escape_single_quotes(result.node.unique_id)),
                dbt.string_literal(result.node.resource_type),
                dbt.string_literal(result.status),
                result.execution_time or 0,
                result.failures if result.failures is not none else 'null',
                "timestamptz '" ~ (ends | max).isoformat() ~ "+00:00'" if ends else 'null',
            ] -%}
            {%- do rows.append('(' ~ values | join(', ') ~ ')') -%}
        {%- endfor -%}
        {%- if rows -%}
            {{ store_rows(rows, graph.nodes | sort) }}
        {%- endif -%}
    {%- endif -%}
{%- endmacro %}

{% macro store_rows(rows, nodes) -%}
do $store_results$
begin
    -- Two invocations at a time must not both create.
    perform pg_advisory_xact_lock(132);
    if to_regclass('monitoring.dbt_results') is null then
        create schema if not exists monitoring;
        create table if not exists monitoring.dbt_results (
            invocation_id text not null,
            unique_id text not null,
            resource_type text not null,
            status text not null,
            execution_seconds double precision not null,
            failures bigint,
            finished_at timestamptz,
            primary key (invocation_id, unique_id)
        );
    end if;
    insert into monitoring.dbt_results
        (invocation_id, unique_id, resource_type, status, execution_seconds, failures, finished_at)
    values
        {{ rows | join(',\n        ') }}
    on conflict do nothing;
    delete from monitoring.dbt_results as old
    where old.unique_id not in ('{{ nodes | join("', '") }}')
    or (
        old.invocation_id not in (
            select invocation_id
            from monitoring.dbt_results
            group by invocation_id
            order by max(finished_at) desc nulls last
            limit 50
        )
        and (
            old.finished_at is null
            or exists (
                select 1
                from monitoring.dbt_results as newer
                where newer.unique_id = old.unique_id
                    and newer.status = old.status
                    and newer.finished_at > old.finished_at
            )
        )
    );
exception
    when insufficient_privilege or read_only_sql_transaction then
        raise notice 'this user may not write to monitoring.dbt_results: nothing is stored';
end
$store_results$
{%- endmacro %}
