from benchmarks.machine import read_results
from benchmarks.summary import README
from benchmarks.telemetry_cost import table


def test_telemetry_costs_less_than_half_a_percent_of_a_step():
    shares = read_results("telemetry_cost")["share_at_log_interval"]

    # Megatron's default is 100.
    assert shares["10"] < 0.005
    assert shares["100"] < 0.005


def test_committed_cost_of_telemetry_is_the_one_described():
    assert table(read_results("telemetry_cost")) in README.read_text()
