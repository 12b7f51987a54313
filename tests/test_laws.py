"""The ten laws of the design, one line each, and the tests that hold them."""

import ast
import functools
import pathlib

import pytest

HERE = pathlib.Path(__file__).parent

# Law -> its one line, and tests as FILE::NAME. Where several devices or hosts are meant, these are one host's.
LAWS: dict[int, tuple[str, list[str]]] = {
  1: ('sampler and trainer are one model: in float32 their log-probs agree to 1e-4 nats a token', [
    'test_attention.py::test_decode_and_prefill_equal_the_training_forward',
    'test_sampler.py::test_the_samplers_log_probs_equal_the_trainers_on_packed_rows',
    'test_run.py::test_sampler_and_trainer_agree_on_what_was_sampled']),
  2: ('every key is an address, so slot, batch order, mesh and restart change no sample', [
    'test_sampler.py::test_every_run_purpose_step_problem_and_sample_has_its_own_key',
    'test_sampler.py::test_the_order_of_the_prompts_changes_no_token',
    'test_mesh.py::test_the_same_tokens_are_sampled_on_every_mesh',
    'test_resume.py::test_rl_stopped_killed_and_resumed_equals_uninterrupted']),
  3: ('the ids that were sampled are the ids that are trained on', [
    'test_update.py::test_packing_keeps_every_token_log_prob_advantage_and_weight_exactly_once',
    'test_sampler.py::test_end_of_text_is_part_of_the_response_and_nothing_follows_it']),
  4: ('a run killed at any moment and started again is the run that was left alone, bit for bit', [
    'test_resume.py::test_rl_stopped_killed_and_resumed_equals_uninterrupted',
    'test_resume.py::test_rl_told_to_stop_finishes_its_step_saves_and_ends_well',
    'test_resume.py::test_pretraining_killed_and_resumed_writes_the_same_base',
    'test_evaluate.py::test_an_evaluation_killed_in_mid_line_goes_on_to_the_same_bytes',
    'test_rejection.py::test_sampling_killed_in_mid_line_goes_on_to_the_same_bytes',
    'test_sft.py::test_a_run_that_is_stopped_and_goes_on_equals_one_that_was_not']),
  5: ('one table says where arrays live, a collision raises, and no mesh changes a number beyond rounding', [
    'test_mesh.py::test_the_same_tokens_are_sampled_on_every_mesh',
    'test_mesh.py::test_one_step_gives_the_same_loss_gradient_and_weights_on_every_mesh',
    'test_mesh.py::test_two_logical_axes_on_one_mesh_axis_raise_naming_both']),
  6: ('a mean names its denominator, which counts the whole step', [
    'test_grpo.py::test_token_weights_are_the_named_means',
    'test_update.py::test_accumulation_and_packing_change_no_gradient_and_no_metric',
    'test_objectives.py::test_accumulation_padding_and_packing_change_no_gradient',
    'test_sft.py::test_loss_and_gradient_are_those_of_single_examples',
    'test_sft.py::test_accumulation_changes_no_gradient_with_the_balance_term_either',
    'test_mesh.py::test_one_step_gives_the_same_loss_gradient_and_weights_on_every_mesh']),
  7: ('what is dropped, cut, tied or unreadable is counted, and experts drop nothing', [
    'test_experts.py::test_no_token_is_dropped',
    'test_grpo.py::test_a_tied_group_such_as_eight_rewards_of_seven_tenths_has_exactly_no_advantage',
    'test_run.py::test_verdicts_add_up_to_the_samples',
    'test_run.py::test_truncated_answers_are_counted',
    'test_terms.py::test_the_reward_is_the_weighted_sum_and_nothing_where_the_reference_cannot_be_read',
    'test_problems.py::test_a_problem_whose_gold_answer_is_absent_or_unreadable_is_left_out_counted_and_named',
    'test_run.py::test_prompts_left_out_are_counted_and_named',
    'test_rejection.py::test_traces_are_the_good_samples_and_the_reasons_add_up',
    'test_decontaminate.py::test_the_config_key_leaves_overlapping_problems_out_counted_and_named',
    'test_traces.py::test_long_examples_are_left_out_counted_and_named']),
  8: ('a stage lists its programs, which compile from abstract arguments and are those that run', [
    'test_run.py::test_every_jitted_function_is_listed_and_compiles_from_abstract_arguments_to_the_program_of_the_run',
    'test_run.py::test_nothing_is_compiled_after_the_second_step',
    'test_evaluate.py::test_the_stage_alone_gives_the_first_evaluation_of_rl_and_its_program_is_listed',
    'test_sft.py::test_the_programs_are_those_that_run']),
  9: ('text from a model is checked in a process that can be killed', [
    'test_rewards.py::test_hostile_answers_cost_at_most_their_limit_and_no_neighbour_anything',
    'test_rewards.py::test_workers_inherit_limits_and_no_secrets',
    'test_problems.py::test_a_reference_that_takes_forever_to_read_costs_its_limit_and_is_named',
    'test_code.py::test_a_hundred_hostile_programs_are_contained',
    'test_code.py::test_each_way_of_containing_programs_holds_by_itself']),
  10: ('fewer than 100 keys, each read; bad input is refused before any compile, with the remedy', [
    'test_config.py::test_there_are_fewer_than_100_keys',
    'test_config.py::test_every_key_is_read',
    'test_config.py::test_rl_refuses',
    'test_config.py::test_evaluation_and_rejection_sampling_refuse',
    'test_config.py::test_the_command_line_refuses',
    'test_run.py::test_derived_sizes_are_printed_before_the_run']),
}


@functools.cache
def defined_tests(file: str) -> frozenset[str]:
  """Names of the test functions that a file defines."""
  tree = ast.parse((HERE / file).read_text())
  return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[:5] == 'test_')


def test_there_are_ten_laws():
  assert list(LAWS) == list(range(1, 11))


@pytest.mark.parametrize('law', LAWS)
def test_the_tests_of_the_law_exist(law):
  _, ids = LAWS[law]
  assert ids
  for test in ids:
    file, name = test.split('::')
    assert (HERE / file).exists() and name in defined_tests(file), f'law {law} is held by {test}, which there is not'
