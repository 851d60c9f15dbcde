"""Writes the Grafana dashboards: `python tools/dashboards.py`, after every change here.

Each panel says in its description when one looks at it. Names and fields are those of Grafana's own SDK, so that a
dashboard cannot have an option that Grafana does not know. `tests/observe/test_monitoring.py` runs every query on
a real Prometheus.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as models

FOLDER = Path(__file__).parent.parent / "monitoring" / "grafana" / "dashboards"
SOURCE = shapes.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "llama-router"
GREEN, YELLOW, ORANGE, RED, BLUE, GREY = "green", "yellow", "orange", "red", "blue", "#6e7077"
STATES = {
    "off": GREY,
    "loading": YELLOW,
    "ready": GREEN,
    "draining": ORANGE,
    "stopping": ORANGE,
    "failed": RED,
    "asleep": BLUE,
}
HERE = 'instance=~"$instance"'
MODEL = f'{HERE},model=~"$model"'

Query = tuple[str, str]
"""An expression and its legend."""


def of(metric: str, *matchers: str) -> str:
    """A metric of the chosen routers."""
    return f"{metric}{{{','.join((HERE, *matchers))}}}"


def of_model(metric: str, *matchers: str) -> str:
    """A metric of the chosen models."""
    return f"{metric}{{{','.join((MODEL, *matchers))}}}"


def rate(series: str) -> str:
    return f"rate({series}[$__rate_interval])"


def quantile(share: float, buckets: str, *labels: str) -> str:
    return f"histogram_quantile({share}, sum by ({', '.join(('le', *labels))}) ({rate(buckets)}))"


def where_models_compute(metric: str) -> str:
    """The sum over GPUs; without any, that of the RAM."""
    gpus, ram = (of(metric, f'device{match}"host"') for match in ("!=", "="))
    return f"sum({gpus}) or sum({ram})"


def state_code(matchers: str) -> str:
    """A number per state, for timelines: the position in STATES. Models that had no engine are left out."""
    parts = (f'{code} * router_model_state{{{matchers},state="{state}"}}' for code, state in enumerate(STATES))
    there = f'max_over_time(router_model_state{{{matchers},state!="off"}}[$__range] @ end()) > 0'
    return f"sum by (instance, model) ({' or '.join(parts)}) and on (instance, model) ({there})"


def number(
    title: str, why: str, query: str, *, unit: str = "short", warn: float | None = None, bad: float | None = None
) -> stat.Panel:
    """One figure, coloured from `warn` and `bad` on."""
    steps = [(None, GREEN if warn is not None or bad is not None else BLUE), (warn, YELLOW), (bad, RED)]
    panel = (
        stat.Panel().title(title).description(why).datasource(SOURCE).unit(unit).no_value("–").height(4).span(3)
    )
    panel.with_target(prometheus.Dataquery().expr(query).ref_id("A").instant().datasource(SOURCE))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    panel.graph_mode(shapes.BigValueGraphMode.NONE)
    return panel.thresholds(thresholds([steps[0], *(step for step in steps[1:] if step[0] is not None)]))


def thresholds(steps: Sequence[tuple[float | None, str]]) -> dashboard.ThresholdsConfig:
    return dashboard.ThresholdsConfig().steps([models.Threshold(value, color) for value, color in steps])


def graph(
    title: str,
    why: str,
    *queries: Query,
    unit: str = "short",
    stacked: bool = False,
    bound: str = "",
    width: int = 12,
) -> timeseries.Panel:
    """Lines over time. The series whose legend matches `bound` is a limit: a dashed red line, never stacked."""
    panel = timeseries.Panel().title(title).description(why).datasource(SOURCE).unit(unit).min(0)
    panel.height(8).span(width).line_width(1).fill_opacity(30 if stacked else 8)
    panel.show_points(shapes.VisibilityMode.NEVER)
    panel.tooltip(
        common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI).sort(shapes.SortOrder.DESCENDING)
    )
    legend = common.VizLegendOptions().show_legend(True)
    if width >= 12:
        legend.display_mode(shapes.LegendDisplayMode.TABLE).placement(shapes.LegendPlacement.RIGHT)
        legend.calcs(["lastNotNull", "max"])
    else:
        legend.display_mode(shapes.LegendDisplayMode.LIST).placement(shapes.LegendPlacement.BOTTOM)
    panel.legend(legend)
    if stacked:
        panel.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL))
    for letter, (expression, name) in zip("ABCDEF", queries, strict=False):
        target = prometheus.Dataquery().expr(expression).legend_format(name).ref_id(letter).range()
        panel.with_target(target.datasource(SOURCE))
    if bound:
        dashed = {"fill": "dash", "dash": [8, 6]}
        styles = {
            "color": {"mode": "fixed", "fixedColor": RED},
            "custom.lineStyle": dashed,
            "custom.fillOpacity": 0,
            "custom.stacking": {"mode": "none", "group": "bound"},
        }
        panel.override_by_regexp(bound, [models.DynamicConfigValue(name, value) for name, value in styles.items()])
    return panel


def timeline(title: str, why: str, query: str, width: int = 24) -> statetimeline.Panel:
    """The states of models over time."""
    panel = statetimeline.Panel().title(title).description(why).datasource(SOURCE).height(8).span(width)
    panel.with_target(prometheus.Dataquery().expr(query).legend_format("{{model}}").ref_id("A").range())
    panel.show_value(shapes.VisibilityMode.NEVER).merge_values(True).fill_opacity(80).line_width(0)
    panel.color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
    results = {
        str(code): models.ValueMappingResult(text=state, color=color, index=code)
        for code, (state, color) in enumerate(STATES.items())
    }
    panel.legend(common.VizLegendOptions().show_legend(True).placement(shapes.LegendPlacement.BOTTOM))
    return panel.mappings([models.ValueMap(results)])


def board(uid: str, title: str, why: str, *, by_model: bool = False) -> dashboard.Dashboard:
    """An empty dashboard with its variables, and links to the others."""
    new = dashboard.Dashboard(title).uid(uid).description(why).tags([TAG]).readonly()
    new.time("now-1h", "now").refresh("10s").timezone("browser").tooltip(models.DashboardCursorSync.CROSSHAIR)
    new.link(
        dashboard.DashboardLink("llama-router")
        .type(models.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .include_vars(True)
        .keep_time(True)
    )
    for annotation in (
        mark(
            "Starts of the router",
            f"resets({of('router_uptime_seconds')}[$__rate_interval]) > 0 or ("
            f"min_over_time({of('router_uptime_seconds')}[$__rate_interval]) < 60 "  # it was down for longer
            f"unless {of('router_uptime_seconds')} offset $__rate_interval)",
            "{{instance}} was started",
            BLUE,
        ),
        mark(
            "Restarts of engines",
            f"increase({of('router_engine_restarts_total')}[$__rate_interval]) > 0",
            "{{model}} was restarted after a failure",
            RED,
        ),
    ):
        new.annotation(annotation)
    new.with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    new.with_variable(variable("instance", "Router", "label_values(router_uptime_seconds, instance)"))
    if by_model:
        new.with_variable(variable("model", "Model", f"label_values(router_model_status{{{HERE}}}, model)"))
    return new


def mark(name: str, query: str, title: str, color: str) -> dashboard.AnnotationQuery:
    """Vertical lines in all graphs, where a query has a value."""
    new = dashboard.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(color)
    return new.expr(query).title_format(title)


def variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    new = dashboard.QueryVariable(name).label(label).datasource(SOURCE).query(query).multi(True).include_all(True)
    new.current(models.VariableOption(text="All", value="$__all")).all_value(".+")
    return new.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)


def overview() -> dashboard.Dashboard:
    new = board("llama-router-overview", "llama-router: overview", "What is loaded, what waits, what fails.")
    reserved, total = of("router_memory_reserved_bytes"), of("router_memory_total_bytes")
    waits = of("router_queue_oldest_wait_seconds")
    done = rate(of("router_requests_total"))
    failed = of("router_model_state", 'state="failed"')
    unserved = 'status!~"served|cancelled"'
    failures = rate(of("router_requests_total", unserved))
    refused = 'status=~"queue_full|displaced|too_many_bodies|missing_api_key|invalid_api_key"'
    new.with_row(dashboard.Row("Now"))
    for panel in (
        number(
            "Up for",
            "A short time here explains empty queues and cold models.",
            f"min({of('router_uptime_seconds')})",
            unit="s",
        ),
        number("Resident models", "How many engines run.", f"sum({of('router_models_loaded')})"),
        number(
            "Waiting",
            "Requests without a slot. Look at *Scheduler* for the reason when this stays up.",
            f"sum({of('router_queue_depth')})",
            warn=10,
            bad=100,
        ),
        number(
            "Oldest wait",
            "The request that has waited longest, of any priority.",
            f"max({waits})",
            unit="s",
            warn=30,
            bad=120,
        ),
        number("In flight", "Requests that engines are answering.", f"sum({of('router_active_requests')})"),
        number(
            "Failed models",
            "Models in their cooldown after failed loads or crashes; `llama-router logs` says why.",
            f"sum({failed})",
            bad=1,
        ),
        number(
            "Not served",
            "Share of requests that were refused or failed, of those that ended lately.",
            f"sum({failures}) / (sum({done}) > 0) or vector(0)",
            unit="percentunit",
            warn=0.01,
            bad=0.05,
        ),
        number(
            "Tokens/s",
            "Tokens of answers a second, all models together.",
            f"sum({rate(of('router_output_tokens_total'))})",
        ),
    ):
        new.with_panel(panel)
    new.with_row(dashboard.Row("Models and memory"))
    for panel in (
        timeline("States", "Which models were there when, and which failed.", state_code(HERE)),
        graph(
            "Memory of models",
            "What fills the GPUs (without any: the RAM). What others hold counts against the budget, too.",
            (f"sum by (model) ({of('router_model_vram_bytes')}) > 0", "{{model}}"),
            (where_models_compute("router_memory_external_bytes"), "others"),
            (where_models_compute("router_memory_total_bytes"), "total"),
            unit="bytes",
            stacked=True,
            bound="/^total$/",
        ),
        graph(
            "Memory of devices",
            "How full each device is; engines run out of memory where this reaches 100 %.",
            (f"({reserved} + {of('router_memory_external_bytes')}) / {total}", "{{device}}"),
            (f"{reserved} / {total}", "{{device}}, models"),
            unit="percentunit",
        ),
    ):
        new.with_panel(panel)
    new.with_row(dashboard.Row("Requests"))
    for panel in (
        graph(
            "Requests by outcome",
            "What became of them: everything but *served* and *cancelled* is an error that a "
            "client saw, under its code.",
            (f"sum by (status) ({done})", "{{status}}"),
            unit="reqps",
            stacked=True,
        ),
        graph(
            "Waiting, by priority",
            "Load beyond what the slots take. Only *low* waiting is as it should be.",
            (f"sum by (priority) ({of('router_queue_by_priority')})", "{{priority}}"),
            stacked=True,
        ),
        graph(
            "Wait for a slot, by priority",
            "What clients feel before their model begins; *high* should lie lowest.",
            (quantile(0.5, of("router_queue_wait_seconds_bucket"), "priority"), "{{priority}} p50"),
            (quantile(0.95, of("router_queue_wait_seconds_bucket"), "priority"), "{{priority}} p95"),
            unit="s",
        ),
        graph(
            "Time to the first token, by priority",
            "Wait, load and prefill together, of streams.",
            (quantile(0.5, of("router_time_to_first_token_seconds_bucket"), "priority"), "{{priority}} p50"),
            (quantile(0.95, of("router_time_to_first_token_seconds_bucket"), "priority"), "{{priority}} p95"),
            unit="s",
        ),
        graph(
            "Duration",
            "From the whole request to the end of its answer.",
            *(
                (quantile(share, of("router_request_duration_seconds_bucket")), f"p{share * 100:.0f}")
                for share in (0.5, 0.95, 0.99)
            ),
            unit="s",
        ),
        graph(
            "Tokens",
            "Throughput of the machine: prompts read, found in a cache, and answers written.",
            (f"sum({rate(of('router_output_tokens_total'))})", "answers"),
            (f"sum({rate(of('router_input_tokens_total'))})", "prompts"),
            (f"sum({rate(of('router_cached_tokens_total'))})", "prompts, from the cache"),
        ),
    ):
        new.with_panel(panel)
    new.with_row(dashboard.Row("Clients"))
    by_client = "sum by (client) ({})".format
    for panel in (
        graph(
            "Requests, by client",
            "Who uses the machine, of clients with names (`api.clients`).",
            (by_client(rate(of("router_client_requests_total"))), "{{client}}"),
            unit="reqps",
            stacked=True,
        ),
        graph(
            "Tokens, by client",
            "What that costs: many short requests may take less than one long prompt.",
            (by_client(rate(of("router_client_output_tokens_total"))), "{{client}} answers"),
            (by_client(rate(of("router_client_input_tokens_total"))), "{{client}} prompts"),
        ),
        graph(
            "Wait for a slot, by client",
            "Whether the load of one is the wait of another; `priority` and `highest_priority` change that.",
            (quantile(0.5, of("router_client_queue_wait_seconds_bucket"), "client"), "{{client}} p50"),
            (quantile(0.95, of("router_client_queue_wait_seconds_bucket"), "client"), "{{client}} p95"),
            unit="s",
        ),
        graph(
            "Not served, by client",
            "Requests that were refused or failed. One client alone: look at what it sends.",
            (
                f"sum by (client, status) ({rate(of('router_client_requests_total', unserved))})",
                "{{client}} {{status}}",
            ),
            unit="reqps",
            stacked=True,
        ),
    ):
        new.with_panel(panel)
    new.with_row(dashboard.Row("Limits"))
    for panel in (
        graph(
            "Slots in use",
            "At 100 % of all slots, requests wait although their models are there: more slots (`-np`) may help.",
            (f"sum({of('router_model_slots_used')}) / (sum({of('router_model_slots')}) > 0)", "all"),
            (f"{of('router_model_slots_used')} / ({of('router_model_slots')} > 0)", "{{model}}"),
            unit="percentunit",
        ),
        graph(
            "Resident models against their limit",
            "At `max_concurrent_models`, a model is loaded only when another leaves, although memory may be free.",
            (f"sum({of('router_models_loaded')})", "resident"),
            (f"sum({of('router_models_limit')})", "limit"),
            bound="/^limit$/",
        ),
        graph(
            "Connections against their limit",
            "At the limit, who is idle gives way; when nobody is, newcomers are refused.",
            (f"sum({of('router_connections')})", "open"),
            (f"sum({of('router_connections_limit')})", "limit"),
            bound="/^limit$/",
        ),
        graph(
            "Refused clients",
            "Wrong keys and full queues, and connections that broke rules or found no place, by reason.",
            (f"sum by (status) ({rate(of('router_requests_total', refused))})", "{{status}}"),
            (f"sum by (code) ({rate(of('router_pages_refused_total'))})", "{{code}}, pages"),
            (f"sum by (reason) ({rate(of('router_clients_refused_total'))})", "{{reason}}, connections"),
            unit="reqps",
            stacked=True,
        ),
    ):
        new.with_panel(panel)
    new.with_row(dashboard.Row("Disks, pulls and configuration"))
    for panel in (
        graph(
            "Free space",
            "What is left of the disks with state, log, conversations (*kv*), downloads (*cache*) and models.",
            (f"{of('router_disk_free_bytes')} / {of('router_disk_total_bytes')}", "{{place}}"),
            unit="percentunit",
            width=8,
        ),
        graph(
            "Conversations on disk",
            "At the limit, what saves least time per byte is deleted.",
            (f"sum({of('router_kv_saved_bytes')})", "saved"),
            (f"sum({of('router_kv_limit_bytes')})", "limit"),
            unit="bytes",
            bound="/^limit$/",
            width=8,
        ),
        graph(
            "Downloads",
            "How fast pulls are.",
            (f"sum({rate(of('router_pull_bytes_total'))})", "received"),
            unit="Bps",
            width=8,
        ),
        graph(
            "Pulls",
            "How many run, and how they ended; the log says why one failed.",
            (f"sum({of('router_pulls_running')})", "running"),
            (f"sum by (outcome) (increase({of('router_pulls_total')}[$__rate_interval]))", "{{outcome}}"),
            width=8,
        ),
        graph(
            "Reloads",
            "When the configuration was read again, and whether it was right.",
            (f"sum by (outcome) (increase({of('router_config_reloads_total')}[$__rate_interval]))", "{{outcome}}"),
            width=8,
        ),
        number(
            "Configuration loaded",
            "When the configuration in effect was loaded.",
            f"1000 * max({of('router_config_last_load_timestamp_seconds')})",
            unit="dateTimeFromNow",
        ),
        number(
            "Failed reload",
            "1: the file was changed to something that is not right, and is not in effect.",
            f"sum(1 - {of('router_config_last_reload_successful')})",
            bad=1,
        ),
        number(
            "Configurations",
            "How many different ones the chosen routers run.",
            f'count(count_values("value", {of("router_config_hash")}))',
        ),
    ):
        new.with_panel(panel)
    new.with_row(dashboard.Row("GPUs"))
    for panel in (
        graph(
            "GPU utilisation",
            "Whether the GPUs are what limits. All of them idle while requests wait: look at *Scheduler*.",
            (f"{of('router_gpu_utilization_percent')} / 100", "GPU {{gpu}}"),
            unit="percentunit",
            width=8,
        ),
        graph(
            "GPU temperature",
            "A hot GPU lowers its clock, and every answer takes longer.",
            (of("router_gpu_temperature_celsius"), "GPU {{gpu}}"),
            unit="celsius",
            width=8,
        ),
        graph(
            "GPU power",
            "At its limit a GPU is as fast as it gets.",
            (of("router_gpu_power_watts"), "GPU {{gpu}}"),
            (of("router_gpu_power_limit_watts"), "GPU {{gpu}}, limit"),
            unit="watt",
            bound="/limit$/",
            width=8,
        ),
    ):
        new.with_panel(panel)
    new.with_row(dashboard.Row("Machine and router"))
    for panel in (
        graph(
            "CPU",
            "Whether the machine is what limits, and whether the router itself takes its share.",
            (f"{of('router_system_cpu_percent')} / 100", "machine"),
            (rate(of("process_cpu_seconds_total")), "router, in cores"),
            unit="percentunit",
            width=8,
        ),
        graph(
            "RAM",
            "Before the kernel kills an engine, this is full.",
            (of("router_system_ram_used_bytes"), "used"),
            (of("process_resident_memory_bytes"), "router"),
            (of("router_system_ram_total_bytes"), "total"),
            unit="bytes",
            bound="/^total/",
            width=8,
        ),
        graph(
            "Lag of the event loop",
            "How late the router comes to its work; every token is later by that much.",
            (quantile(0.99, of("router_event_loop_lag_seconds_bucket")), "p99"),
            unit="s",
        ),
        graph(
            "Open files",
            "Connections, pipes and logs. At the limit (`ulimit -n`) nothing can be opened any more.",
            (of("process_open_fds"), "open"),
            (of("process_max_fds"), "limit"),
            bound="/^limit$/",
        ),
    ):
        new.with_panel(panel)
    return new


def model() -> dashboard.Dashboard:
    new = board("llama-router-model", "llama-router: model", "One model, or several side by side.", by_model=True)
    cached = f"sum by (model) ({rate(of_model('router_cached_tokens_total'))})"
    prompts = f"sum by (model) ({rate(of_model('router_input_tokens_total'))})"
    reading = f"sum by (model) ({rate(of_model('router_prefill_seconds_total'))})"
    new.with_row(dashboard.Row("State"))
    for panel in (
        timeline(
            "State", "When it was there, and when it was not although somebody waited.", state_code(MODEL), 12
        ),
        graph(
            "Slots",
            "All slots taken and a queue beside it: more slots (`-np`) may help.",
            (of_model("router_model_slots_used"), "{{model}} used"),
            (of_model("router_model_slots"), "{{model}} slots"),
            bound="/ slots$/",
        ),
        graph(
            "Waiting",
            "Its queue, by priority.",
            (f"sum by (model, priority) ({of_model('router_queue_by_priority')})", "{{model}} {{priority}}"),
            stacked=True,
        ),
        graph(
            "Memory",
            "What it is booked with while it is resident, and what it holds, as measured.",
            (of_model("router_model_vram_bytes"), "{{model}} booked"),
            (of_model("router_model_memory_bytes"), "{{model}} on {{device}}"),
            unit="bytes",
        ),
        graph(
            "Seconds to load",
            "What a cold start costs its first client; a rise means a slower disk or cache.",
            (of_model("router_model_expected_load_seconds"), "{{model}} learnt"),
            (quantile(0.95, of_model("router_model_load_duration_seconds_bucket"), "model"), "{{model}} p95"),
            unit="s",
        ),
        graph(
            "Engines that ended",
            "Stopped by the router under its cause; *crashed*, *hung* and *load_failed* are not its wish.",
            (
                f"sum by (model, reason) (increase({of_model('router_engine_exits_total')}[$__rate_interval]))",
                "{{model}} {{reason}}",
            ),
            stacked=True,
        ),
    ):
        new.with_panel(panel)
    new.with_row(dashboard.Row("Requests"))
    for panel in (
        graph(
            "Requests by outcome",
            "What became of requests to it.",
            (f"sum by (model, status) ({rate(of_model('router_requests_total'))})", "{{model}} {{status}}"),
            unit="reqps",
            stacked=True,
        ),
        graph(
            "Duration",
            "From the whole request to the end of its answer, by route.",
            (quantile(0.5, of_model("router_request_duration_seconds_bucket"), "endpoint"), "{{endpoint}} p50"),
            (quantile(0.95, of_model("router_request_duration_seconds_bucket"), "endpoint"), "{{endpoint}} p95"),
            unit="s",
        ),
        graph(
            "Wait for a slot",
            "What the queue costs its clients.",
            (quantile(0.5, of_model("router_queue_wait_seconds_bucket"), "model"), "{{model}} p50"),
            (quantile(0.95, of_model("router_queue_wait_seconds_bucket"), "model"), "{{model}} p95"),
            unit="s",
        ),
        graph(
            "Time to the first token",
            "Wait, load and prefill together, of streams.",
            (quantile(0.5, of_model("router_time_to_first_token_seconds_bucket"), "model"), "{{model}} p50"),
            (quantile(0.95, of_model("router_time_to_first_token_seconds_bucket"), "model"), "{{model}} p95"),
            unit="s",
        ),
    ):
        new.with_panel(panel)
    new.with_row(dashboard.Row("Tokens"))
    for panel in (
        graph(
            "Tokens",
            "How much it works.",
            (f"sum by (model) ({rate(of_model('router_output_tokens_total'))})", "{{model}} answers"),
            (prompts, "{{model}} prompts"),
        ),
        graph(
            "Time per token",
            "How fast one stream is; it rises when slots share the GPU.",
            (quantile(0.5, of_model("router_time_per_output_token_seconds_bucket"), "model"), "{{model}} p50"),
            (quantile(0.95, of_model("router_time_per_output_token_seconds_bucket"), "model"), "{{model}} p95"),
            unit="s",
        ),
        graph(
            "Prefill",
            "Prompt tokens a second while it reads: what long prompts cost.",
            (
                f"({prompts} - {cached}) / ({reading} > 0)",
                "{{model}}",
            ),
        ),
        graph(
            "Share of prompts in the cache",
            "Whether prefixes are reused; low with agents means too few slots.",
            (f"{cached} / ({prompts} > 0)", "{{model}}"),
            unit="percentunit",
        ),
    ):
        new.with_panel(panel)
    new.with_row(dashboard.Row("Conversations on disk"))
    for panel in (
        graph(
            "Saves and restores",
            "Whether what is saved is used again. Failures are in the log.",
            *(
                (
                    f"sum by (model) (increase({of_model(f'router_kv_{what}_total')}[$__rate_interval]))",
                    f"{{{{model}}}} {what}",
                )
                for what in ("saves", "restores", "failures")
            ),
        ),
        graph(
            "Prefill spared",
            "Seconds of engine time a second that restored prompts would have cost.",
            (f"sum by (model) ({rate(of_model('router_kv_prefill_saved_seconds_total'))})", "{{model}}"),
            unit="s",
        ),
        graph(
            "Restored tokens",
            "Prompt tokens a second that were read from disk instead of computed.",
            (f"sum by (model) ({rate(of_model('router_kv_restored_tokens_total'))})", "{{model}}"),
        ),
        graph(
            "Size on disk",
            "Who fills the folder. At the limit, what saves least time per byte is deleted.",
            (of_model("router_model_kv_saved_bytes"), "{{model}}"),
            (f"max({of('router_kv_limit_bytes')})", "limit"),
            unit="bytes",
            stacked=True,
            bound="/^limit$/",
        ),
    ):
        new.with_panel(panel)
    return new


def scheduler() -> dashboard.Dashboard:
    why = "Why something waits: who is resident, what swaps cost, and whether waits keep their bounds."
    new = board("llama-router-scheduler", "llama-router: scheduler", why)
    oldest = f"max by (priority) ({of('router_queue_oldest_wait_seconds')})"
    refusals = 'status=~"queue_full|displaced|queue_timeout|insufficient_memory|model_failed|shutting_down"'
    broken = of("router_engine_exits_total", 'reason=~"crashed|hung|load_failed"')
    new.with_row(dashboard.Row("Residency"))
    new.with_panel(timeline("Residency", "Who had memory when, and who drained for whom.", state_code(HERE)))
    for panel in (
        graph(
            "Loads",
            "Swaps show as loads; many with short residence mean too little memory, or a "
            "`residency_factor` that is too small.",
            (f"sum by (model) (increase({of('router_model_loads_total')}[$__rate_interval]))", "{{model}}"),
            stacked=True,
        ),
        graph(
            "Stops, by cause",
            "*idle* is tidying up, *evicted* and *drained* are swaps, *manual* was somebody.",
            (f"sum by (cause) (increase({of('router_model_ejects_total')}[$__rate_interval]))", "{{cause}}"),
            stacked=True,
        ),
        graph(
            "Time spent loading",
            "Seconds of loading a second. Above a half, memory is swapped more than used.",
            (f"sum({rate(of('router_model_load_duration_seconds_sum'))})", "loading"),
            unit="percentunit",
        ),
        graph(
            "Residence",
            "For how long the engines that are there have been ready.",
            (f"{of('router_model_resident_seconds')} > 0", "{{model}}"),
            unit="s",
        ),
    ):
        new.with_panel(panel)
    new.with_row(dashboard.Row("Waits"))
    for panel in (
        graph(
            "Oldest wait against its bound",
            "Beyond the bound, a busy model drains for the one that waits; what "
            "comes on top is the drain and the load.",
            (oldest, "{{priority}}"),
            (f"max by (priority) ({of('router_scheduler_max_wait_seconds')})", "bound {{priority}}"),
            unit="s",
            bound="/^bound/",
        ),
        graph(
            "Longest waits for a slot",
            "The worst of a hundred, by priority, and the wait after which 504 is sent.",
            (quantile(0.99, of("router_queue_wait_seconds_bucket"), "priority"), "{{priority}} p99"),
            (f"max({of('router_queue_timeout_seconds')})", "bound"),
            unit="s",
            bound="/^bound/",
        ),
        graph(
            "Fullest queue against its bound",
            "At the bound, requests are refused with 429.",
            (f"topk(5, {of('router_queue_depth')})", "{{model}}"),
            (f"max({of('router_queue_limit')})", "bound"),
            bound="/^bound/",
        ),
        graph(
            "Refusals",
            "Requests that got no slot, by code.",
            (f"sum by (status) ({rate(of('router_requests_total', refusals))})", "{{status}}"),
            unit="reqps",
            stacked=True,
        ),
    ):
        new.with_panel(panel)
    new.with_row(dashboard.Row("Engines"))
    for panel in (
        graph(
            "Engines that ended",
            "What the router did not wish for: *crashed*, *hung*, *load_failed*.",
            (f"sum by (model, reason) (increase({broken}[$__rate_interval]))", "{{model}} {{reason}}"),
            stacked=True,
            width=8,
        ),
        graph(
            "Silence",
            "For how long an engine with work has sent nothing; long prompts show here, hangs too.",
            (f"{of('router_engine_silent_seconds')}", "{{model}}"),
            unit="s",
            width=8,
        ),
        graph(
            "Second tries",
            "Requests that survived the end of their engine, or of a connection to it.",
            (f"sum(increase({of('router_retry_attempts_total')}[$__rate_interval]))", "queued again"),
            (f"sum(increase({of('router_upstream_resends_total')}[$__rate_interval]))", "sent again"),
            width=8,
        ),
    ):
        new.with_panel(panel)
    return new


def rendered() -> dict[str, str]:
    """File names and what belongs into them."""
    boards = {"overview": overview(), "model": model(), "scheduler": scheduler()}
    return {f"{name}.json": _json(new.build()) for name, new in boards.items()}


def _json(new: models.Dashboard) -> str:
    for number_, panel in enumerate(new.panels or (), 1):
        panel.id_val = number_
    return json.dumps(new, cls=JSONEncoder, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in rendered().items():
        (FOLDER / name).write_text(text)
