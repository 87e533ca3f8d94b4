#!/bin/bash
{#- Filled in by `copd launch CONFIG` for one machine, which shows it with --dry-run. #}
# One thread per process: several processes share the cores, and more threads than cores cost far more than they give.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
{%- for name, value in environment.items() %}
export {{ name }}={{ value | quoted }}
{%- endfor %}
exec {{ python | quoted }} -m copd_megatron.cli train {{ run_dir | quoted }}/config.yaml
