"""The heart of the suite, on other configs of the same families."""

import pytest
from test_contract import (  # noqa: F401  run here with other configs
    test_a_flow_is_patched_as_by_a_state_that_holds_one_source_alone,
    test_a_resumed_sweep_is_the_plain_one,
    test_a_search_that_goes_on_from_earlier_passes_is_the_plain_one,
    test_a_written_state_is_what_the_recurrence_goes_on_from,
    test_everything_patched_is_the_corrupted_run,
    test_noise_at_every_value_moves_the_logits_and_nothing_before_it,
    test_our_own_scan_gives_the_logits_of_the_stock_model,
    test_parts_are_patched_as_by_writing_their_values_by_hand,
    test_the_states_follow_the_recurrence_as_it_is_written_down,
    test_the_stream_is_the_sum_of_what_the_nodes_add,
    test_writing_back_what_was_read_moves_nothing,
)
from tiny import VARIANTS

pytestmark = pytest.mark.parametrize("family", VARIANTS)
