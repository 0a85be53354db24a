"""What can go wrong, what happens then, and which tests prove it.

    python -m tests.matrix            print the table
    python -m tests.matrix --write    put it into docs/reliability.md

`test_matrix` fails if a row has neither a test nor a reason, if a test that is named here does not
exist, and if the page does not hold the table as it is here.
"""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


@dataclass(frozen=True)
class Row:
    """A failure, what is expected, and the tests that hold it."""

    failure: str
    answer: str
    tests: tuple[str, ...] = ()
    """Names of test functions, wherever they stand."""
    open: str = ""
    """What is not proven here, and why."""


ROWS = {
    "A1": Row(
        "killed at any instant (`kill -9`, out-of-memory killer)",
        "what was committed stays; the same command ends with the bytes of a run left alone",
        (
            "test_a_kill_at_every_call_of_a_store_s_writer_loses_nothing_and_a_rerun_completes_it",
            "test_a_fault_at_every_call_of_a_stage_loses_nothing_and_a_rerun_completes_it",
            "test_extract_killed_at_six_random_moments_ends_with_the_same_bytes",
            "test_train_killed_at_two_random_moments_ends_with_the_same_bytes",
            "test_encode_killed_at_two_random_moments_ends_with_the_same_bytes",
            "test_fifty_kills_at_random_moments_change_nothing",
            "test_a_fault_at_any_flush_or_rename_is_mended_by_running_again",
        ),
    ),
    "A2": Row(
        "killed while resuming, again and again",
        "each start begins where the last one stopped",
        ("test_resumes_that_are_killed_again_and_again_only_ever_go_forward",),
    ),
    "A3": Row(
        "Ctrl-C once, twice; SIGTERM",
        "exit 130 or 143 within five seconds, with the line that resumes; twice: at once",
        (
            "test_ctrl_c_exits_130_at_once_and_the_line_it_prints_completes_the_run",
            "test_sigterm_exits_143_with_a_line_that_resumes",
            "test_a_signal_at_two_random_moments_ends_a_stage_at_once_and_loses_nothing",
            "test_a_second_signal_ends_the_stage_there_and_then_and_loses_nothing",
            "test_a_signal_at_fifty_random_moments_loses_nothing",
            "test_the_installed_command_runs_and_is_interrupted_as_any_other",
        ),
    ),
    "A4": Row(
        "the disk is full, fails, or refuses, at any write",
        "exit 5, no half file under a final name, the old version intact; a rerun completes",
        (
            "test_an_error_of_the_disk_at_every_call_of_a_store_s_writer_keeps_what_was_there",
            "test_what_was_complete_survives_an_error_at_every_call_of_a_rerun",
            "test_a_fault_at_every_call_of_a_stage_loses_nothing_and_a_rerun_completes_it",
            "test_a_full_disk_at_some_flushes_and_renames_is_mended_by_running_again",
            "test_a_full_disk_exits_5_keeps_what_was_committed_and_is_resumed",
            "test_a_disk_that_fills_in_the_middle_of_a_write_keeps_the_old_file",
            "test_an_error_of_the_disk_keeps_the_old_file_and_is_typed",
        ),
    ),
    "A5": Row(
        "the disk is too small for what the run will write",
        "exit 5 before the first forward pass, with both numbers; `run.ignore_space=true` starts",
        (
            "test_a_disk_that_is_too_small_is_refused_before_any_work",
            "test_what_a_resumed_run_has_written_is_taken_off_what_it_needs",
            "test_a_run_may_start_on_a_small_disk_if_it_is_told_to",
            "test_the_space_that_is_free_is_that_of_the_disk_the_folder_will_lie_on",
            "test_the_rows_of_a_plan_are_the_tokens_kept_or_one_an_example",
            "test_the_bytes_of_a_store_are_those_of_its_files",
            "test_the_bytes_of_a_store_of_features_are_those_of_its_files",
            "test_the_bytes_of_a_training_are_those_of_its_checkpoints_and_saes",
        ),
    ),
    "A6": Row(
        "a flush to the disk fails",
        "exit 5; the shard counts as not written",
        (
            "test_an_error_of_the_disk_keeps_the_old_file_and_is_typed",
            "test_an_error_of_the_disk_at_every_call_of_a_store_s_writer_keeps_what_was_there",
        ),
    ),
    "A7": Row(
        "power cut: names on the disk, their bytes not",
        "no record ever names bytes that were not flushed",
        (
            "test_a_power_cut_at_any_moment_leaves_no_record_of_lost_bytes",
            "test_five_hundred_states_after_a_power_cut_are_all_legal",
            "test_the_replay_finds_a_writer_that_forgets_to_flush_its_files",
            "test_the_replay_finds_a_writer_that_forgets_to_flush_its_folders",
        ),
    ),
    "A8": Row(
        "a bit flips in any file",
        "exit 4 with the file's name before a value is used; `saefty store repair` mends stores",
        (
            "test_sixty_flipped_bits_over_every_type_of_file_are_all_caught",
            "test_a_thousand_flipped_bits_over_every_type_of_file_are_all_caught",
            "test_every_flipped_bit_is_caught_before_a_value_is_returned",
            "test_a_harmed_shard_is_named_and_only_its_piece_is_made_again",
            "test_any_other_file_of_a_store_is_mended_too",
            "test_a_damaged_file_of_a_training_is_named_and_not_sealed_again",
            "test_a_damaged_record_of_a_run_is_told_and_made_again",
            "test_damaged_metadata_is_told_with_what_still_can_be_done",
        ),
    ),
    "A9": Row(
        "a shard cut short, emptied, swapped, missing, or one too many",
        "exit 4 with its name, at every position; files that are not ours are left alone",
        (
            "test_every_harm_to_every_shard_is_named_and_no_value_of_it_is_returned",
            "test_a_truncated_missing_or_swapped_shard_is_named",
            "test_a_shard_too_many_is_neither_read_nor_removed",
        ),
    ),
    "A10": Row(
        "two processes in one folder",
        "the second exits 5 and names the first; the lock of a dead process is taken over",
        (
            "test_of_twenty_starters_at_once_exactly_one_wins",
            "test_the_lock_of_a_dead_process_is_taken_over",
            "test_a_second_process_in_the_same_folder_exits_5_and_names_the_first",
        ),
    ),
    "A11": Row(
        "a file system without `flock`; clocks that differ",
        "a lease file stands in, with a warning; its age is told by the file system's clock",
        (
            "test_without_flock_a_lease_stands_in_and_says_so",
            "test_every_way_of_having_no_flock_is_known",
            "test_the_lease_of_a_dead_process_on_this_host_is_taken_over_at_once",
            "test_a_lease_of_another_host_holds_until_it_is_not_touched_for_ten_minutes",
            "test_a_clock_that_is_wrong_does_not_end_a_lease",
            "test_a_lease_is_touched_while_its_holder_lives",
            "test_a_takeover_that_was_killed_half_way_holds_nobody_up_for_long",
        ),
    ),
    "A12": Row(
        "many runs started within one second; a folder with other files",
        "every run has a folder of its own; a folder that holds something else is not touched",
        (
            "test_fifty_runs_started_in_one_second_have_fifty_folders",
            "test_a_folder_with_other_files_is_not_touched",
            "test_a_folder_with_foreign_files_is_not_taken",
        ),
    ),
    "A13": Row(
        "resumed with other settings, data, model, tokenizer or versions",
        "exit 6 with every key that differs, old and new; nothing is touched",
        (
            "test_every_setting_and_input_that_changes_is_named_and_refused",
            "test_a_run_that_another_version_began_is_not_finished_by_this_one",
            "test_a_run_resumed_with_other_settings_exits_6_and_names_the_keys",
            "test_a_run_whose_data_changed_is_refused",
            "test_provenance_names_the_files_by_their_digests",
        ),
    ),
    "A14": Row(
        "more rows than memory",
        "memory does not grow with the rows of a store; the texts of a dataset are held",
        (
            "test_memory_of_extract_does_not_grow_with_the_rows",
            "test_memory_of_encode_does_not_grow_with_the_rows",
            "test_an_index_ordered_a_few_latents_at_a_time_is_the_same_file",
        ),
    ),
    "A15": Row(
        "a forward pass runs out of memory",
        "the batch is read in halves, and those again; exit 5 naming the example that does not "
        "fit alone; a repair writes the same bytes where memory is ample",
        (
            "test_out_of_memory_halves_the_batch_until_it_fits",
            "test_a_batch_read_in_halves_has_the_bytes_of_a_plan_with_those_halves",
            "test_one_example_that_does_not_fit_stops_the_run_and_names_it",
            "test_a_store_made_short_of_memory_is_repaired_to_the_same_bytes_where_memory_is_ample",
        ),
    ),
    "A16": Row(
        "a folder that is read-only, too long, not UTF-8, behind a link; no more open files",
        "exit 2 or 5 with the path and the reason",
        (
            "test_a_folder_that_cannot_be_written_is_named",
            "test_a_folder_that_cannot_be_made_is_named_with_the_reason",
            "test_a_name_that_is_not_utf_8_is_refused_in_words",
            "test_a_folder_behind_a_link_is_written_where_the_link_leads",
            "test_no_more_open_files_is_an_error_and_nothing_half_written",
            "test_a_run_folder_that_is_a_file",
        ),
    ),
    "A17": Row(
        "many layers and many examples",
        "the number of files goes by pieces, not by examples",
        (
            "test_the_number_of_files_goes_by_pieces_and_not_by_examples",
            "test_files_and_pieces_of_a_run_of_forty_pieces",
        ),
    ),
    "A18": Row(
        "colleagues who want to read the files",
        "every file has the mode that the umask gives",
        (
            "test_every_file_of_every_run_has_the_mode_that_the_umask_gives",
            "test_a_committed_file_has_the_mode_that_the_umask_gives",
        ),
    ),
    "B1": Row(
        "NaN or infinity in an activation",
        "stop and name layer and example, or drop the row in all layers and count it",
        (
            "test_a_number_that_is_not_finite_stops_the_reading_and_names_layer_and_example",
            "test_mask_drops_such_rows_in_all_layers_and_counts_them_exactly",
            "test_masked_rows_are_counted_for_each_layer_and_none_is_stored",
            "test_rows_that_were_masked_on_the_way_are_counted_for_each_layer",
            "test_nan_is_refused_and_counted",
        ),
    ),
    "B2": Row(
        "a dtype that changes between saving and loading",
        "every dtype comes back bit for bit; SAEs are float32, thresholds included",
        (
            "test_every_dtype_comes_back_bit_for_bit",
            "test_a_model_in_bfloat16_is_stored_bit_for_bit",
            "test_a_saved_sae_loads_as_it_was",
            "test_a_checkpoint_comes_back_as_it_was",
        ),
    ),
    "B3": Row(
        "an SAE trained on scaled activations reads raw ones",
        "the scaling is folded into the weights; one that cannot be folded is refused",
        (
            "test_folding_a_scaler_changes_what_is_read_not_what_is_said",
            "test_a_subtracted_decoder_bias_is_folded_into_the_encoders",
            "test_a_normalisation_that_is_not_in_the_weights_is_refused",
        ),
    ),
    "B4": Row(
        "most latents are on: raw input, transposed axes, a wrong scale",
        "encode compares L0 and the always-on share with the SAE's record and warns; `saefty sae "
        "verify` names the cause and exits 9",
        ("test_encode_warns_of_features_that_are_no_sparse_code_and_names_the_command",
         "test_a_planted_fault_is_named_on_the_records_own_texts",
         "test_l0_silence_and_the_histogram_count_firing_latents",
         "test_a_latent_that_never_fires_is_silent_and_one_that_always_does_is_always_on"),
    ),
    "B5": Row(
        "padding among the rows; the first token taken for BOS",
        "rows go by mask and token id; left and right padding give the same rows",
        (
            "test_padded_rows_equal_rows_read_alone",
            "test_special_tokens_are_left_out",
            "test_special_tokens_are_marked_by_id_and_template_words_are_not",
        ),
    ),
    "B6": Row(
        "attention sinks: a few rows with enormous norms",
        "special tokens are left out; `saefty sae verify` counts such rows and says what they cost",
        ("test_special_tokens_are_left_out", "test_a_special_token_in_the_text_is_not_kept",
         "test_rows_of_a_hundred_times_the_median_norm_are_counted_and_their_effect_is_told"),
        "extract has no filter by norm",
    ),
    "B7": Row(
        "left padding without positions",
        "positions are always given: a padded batch equals single texts",
        ("test_padded_rows_equal_rows_read_alone", "test_a_batch_of_two_padded_by_hand"),
    ),
    "B8": Row(
        "the hidden state of another layer",
        "captured by a hook on the block; writing it back changes nothing, its neighbour does",
        (
            "test_the_block_output_is_captured_bit_for_bit",
            "test_writing_back_what_was_captured_changes_nothing",
            "test_writing_back_the_neighbour_changes_the_logits",
        ),
    ),
    "B9": Row(
        "a name that could mean two tensors",
        "refused; a family that is not listed is checked on its first batch",
        (
            "test_no_list_or_two_are_refused_with_their_names",
            "test_an_unlisted_family_that_is_misread_is_refused",
        ),
    ),
    "B10": Row(
        "blocks that return a tensor or a tuple",
        "read and edited alike",
        (
            "test_blocks_that_return_tensors_or_tuples_are_read_alike",
            "test_blocks_that_return_tensors_or_tuples_are_edited_alike",
        ),
    ),
    "B11": Row(
        "generation with a cache calls a hook once a token",
        "an edit sees each token once; with and without the cache the replies are the same",
        (
            "test_an_edit_sees_each_token_of_a_generation_once",
            "test_generation_with_a_cache_equals_generation_without_under_an_edit",
        ),
    ),
    "B12": Row(
        "an exception in a forward pass",
        "no hook is left behind",
        ("test_hooks_come_off_after_an_exception", "test_capture_leaves_the_model_as_it_was"),
    ),
    "B13": Row(
        "two BOS tokens",
        "exactly one: the tokenizer's, the template's, or the one that the text spells out",
        (
            "test_a_templated_prompt_has_one_bos_and_the_tokens_that_chat_gives",
        ),
    ),
    "B14": Row(
        "a token across the border of prompt and response",
        "it belongs to the response, and the row says so; English, Japanese, Korean, Russian",
        (
            "test_the_response_starts_at_the_first_token_with_a_character_of_it",
            "test_a_token_across_the_border_belongs_to_the_response_and_is_reported",
            "test_the_text_is_tokenised_as_a_whole",
            "test_annotate_equals_one_sample_at_a_time_by_hand",
        ),
    ),
    "B15": Row(
        "a text longer than the context",
        "left out and counted, or cut at the side asked for; never silently",
        (
            "test_texts_longer_than_the_context_are_counted_or_cut_and_never_silently",
            "test_length_at_the_limit_is_ok_and_one_more_is_too_long",
            "test_truncation_keeps_the_other_end_and_offsets_point_into_the_whole_text",
            "test_a_sample_is_too_long_from_one_token_above_the_models_length",
        ),
    ),
    "B16": Row(
        "a layer that is not there, negative or named twice",
        "exit 2 before the weights are read, with the range",
        (
            "test_a_layer_out_of_range_is_refused_before_the_weights_are_read",
            "test_a_layer_out_of_range_says_the_range",
            "test_a_layer_named_twice_is_refused",
            "test_a_word_that_is_wrong",
        ),
    ),
    "B17": Row(
        "an SAE of another width than the model",
        "exit 6 with both numbers",
        (
            "test_every_pair_of_an_sae_and_a_model_fits_or_is_refused_with_both_widths",
            "test_an_sae_of_another_width",
            "test_an_sae_of_another_width_names_the_likely_right_releases",
        ),
    ),
    "B18": Row(
        "an id of an SAE of another layer than the one that is asked for",
        "exit 6 before the weights are read, with both layers",
        (
            "test_an_id_of_another_layer_than_the_target_is_refused",
            "test_what_does_not_belong_together_is_refused_before_the_weights_load",
        ),
    ),
    "B19": Row(
        "an SAE of a base model used on its tuned one, or on another",
        "a warning that says which of the two it is",
        (
            "test_two_names_of_models_are_told_to_be_the_same_tuned_or_others",
        ),
    ),
    "B20": Row(
        "batches that hold one document",
        "rows are shuffled over the store, in blocks of 64 where it is large",
        (
            "test_batches_of_a_shuffled_stream_mix_documents_as_blind_drawing_would",
            "test_groups_of_a_large_store_take_their_blocks_from_everywhere",
            "test_shuffling_mixes_the_store_and_not_only_its_neighbourhoods",
        ),
    ),
    "B21": Row(
        "a training that stops in the middle",
        "resumed to the byte: weights, optimiser, dead counters, place in the data",
        (
            "test_an_interrupted_training_ends_with_the_same_bytes",
            "test_what_trains_by_autograd_resumes_to_the_same_bytes_too",
            "test_killed_at_random_moments_a_training_ends_with_the_same_bytes",
        ),
    ),
    "B22": Row(
        "a loss that is NaN",
        "stop, keep the last checkpoint, name the rows or the batch",
        (
            "test_a_row_that_is_not_finite_stops_the_training_and_is_named",
            "test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint",
            "test_a_loss_that_is_not_finite_stops_before_the_weights_move",
        ),
    ),
    "B23": Row(
        "dead latents",
        "counted for each latent; they learn from what is left over",
        (
            "test_a_latent_is_dead_once_it_has_not_fired_for_long_enough",
            "test_dead_latents_learn_from_the_residual_and_only_then",
        ),
    ),
    "B24": Row(
        "numbers that depend on the batch",
        "batches are fixed by the plan; another token budget changes rounding alone",
        (
            "test_a_piece_read_alone_has_the_bytes_it_has_among_others",
            "test_the_token_budget_changes_rounding_only",
            "test_the_same_lengths_give_the_same_plan",
        ),
    ),
    "B25": Row(
        "a contrast of zeros: switching attention or the image off changes nothing",
        "an error before the work that names the layer and the likely cause",
        (
            "test_an_attention_that_adds_nothing_stops_the_run_and_names_the_layer",
            "test_an_intervention_without_effect_stops_before_the_work_and_names_the_layer",
            "test_rows_that_are_all_zero_in_a_layer_are_refused",
            "test_what_no_kept_token_can_see_stops_the_run_and_says_which_tokens_can",
        ),
    ),
    "B26": Row(
        "a layer that lacks a shard",
        "exit 4 with the piece and the layer",
        (
            "test_a_shard_of_one_layer_dropped_from_the_manifest_is_refused",
            "test_a_piece_whose_layers_differ_is_refused",
            "test_layers_of_as_many_but_other_rows_are_refused",
        ),
    ),
    "C1": Row(
        "an empty file, a header alone, no newline at the end",
        "an error that says that it holds nothing, or it is read",
        (
            "test_an_empty_file_has_no_lines",
            "test_a_file_without_a_sentence_is_an_error",
            "test_one_line_without_an_end_is_one_sentence",
            "test_a_file_of_another_form_is_refused_with_the_place",
        ),
    ),
    "C2": Row(
        "another encoding than UTF-8, a NUL, half a surrogate",
        "line, byte, likely encoding and the option to set; never read as other characters",
        (
            "test_another_encoding_is_named_with_line_byte_and_how_the_line_reads",
            "test_utf16_without_a_mark_is_named",
            "test_a_nul_is_refused_with_its_line_and_byte",
            "test_half_of_a_surrogate_pair_is_refused_and_named",
        ),
    ),
    "C3": Row(
        "sentences read as a table, a table read as sentences",
        "refused with the option to set",
        (
            "test_a_real_csv_is_refused_with_the_option_to_set",
            "test_sentences_read_as_csv_are_refused_with_the_option_to_set",
            "test_sentences_with_commas_are_not_taken_for_a_table",
        ),
    ),
    "C4": Row(
        "question ids that repeat, are missing or of several kinds",
        "counted and named; samples are known by their place",
        (
            "test_ids_that_repeat_are_missing_or_of_several_kinds_are_counted_and_lose_nothing",
        ),
    ),
    "C6": Row(
        "JSON that is damaged, endless, too deep, or holds NaN or huge numbers",
        "an error with the line and the byte; what is legal is copied byte for byte",
        (
            "test_what_is_not_json_is_named_with_its_place",
            "test_numbers_of_any_size_and_keys_that_repeat_are_passed_over",
            "test_what_is_held_does_not_depend_on_the_longest_line",
        ),
    ),
    "C7": Row(
        "images missing, cut, empty, of another kind, too large, CMYK, transparent, animated",
        "read as one sees it, or a skipped row with its reason; too many of them are an error",
        (
            "test_a_missing_file",
            "test_zero_bytes",
            "test_a_file_cut_anywhere_is_refused_or_whole",
            "test_content_decides_not_the_name",
            "test_a_bomb_is_refused_by_its_header",
            "test_a_bomb_is_refused_before_its_memory_is_taken",
            "test_cmyk_becomes_rgb",
            "test_transparency_lies_on_white",
            "test_of_an_animation_the_first_frame_is_read",
            "test_exif_says_which_way_up_and_only_once",
            "test_an_address_is_never_fetched",
            "test_bad_images_are_counted_and_named_with_their_reason",
            "test_more_than_the_cap_is_an_error_that_says_how_many_which_and_what_to_do",
        ),
    ),
    "C8": Row(
        "a text too long, whose cut would fall into the tokens of an image",
        "never cut there: the example is left out as too long, with the reason",
        ("test_truncation_never_cuts_an_image",),
    ),
    "C9": Row(
        "samples that cannot be read",
        "each says why, the others go on, the last line counts all",
        (
            "test_a_sample_that_fails_says_why_and_the_others_go_on",
        ),
    ),
    "C10": Row(
        "the hub refuses, is away, is cut off, sends other bytes",
        "each told from the others, with what to do; whole files are kept",
        (
            "test_each_refusal_is_told_from_the_others",
            "test_a_connection_that_is_cut_once_goes_on_where_it_was_cut",
            "test_a_connection_that_stays_cut_is_an_error_and_the_next_try_succeeds",
            "test_a_file_of_another_size_than_announced_is_refused",
            "test_bytes_that_differ_from_the_announced_checksum_are_refused_until_deleted",
            "test_a_hub_that_cannot_be_reached_is_told_from_being_offline",
        ),
    ),
    "D1": Row(
        "pickle in `.pt`, `.npz`, `.pkl`, `.npy`, `.joblib`",
        "exit 8, nothing in it is run; no variable of the environment switches that off",
        (
            "test_a_hundred_pickles_that_would_run_something_run_nothing",
            "test_arrays_of_objects_are_refused_and_run_nothing",
            "test_a_pickle_of_another_name_is_never_opened",
            "test_a_pt_file_that_runs_code_is_refused_and_runs_none",
            "test_a_plain_pickle_called_pt_is_refused_and_runs_nothing",
        ),
    ),
    "D2": Row(
        "a `.pt` file that crashes its reader, or never ends",
        "read in a child process with limits; when it dies or hangs, exit 3 with its last words",
        (
            "test_a_child_that_dies_leaves_a_message",
            "test_a_child_that_hangs_is_ended",
            "test_a_pt_file_that_is_none_is_said_to_be_unreadable",
        ),
    ),
    "D3": Row(
        "a distributed checkpoint, which runs code when it is opened",
        "exit 8, not opened",
        ("test_a_distributed_checkpoint_is_not_opened",),
    ),
    "D4": Row(
        "an archive that unpacks to far more, a header that claims terabytes",
        "refused by the sizes in the headers, before anything is allocated",
        (
            "test_an_npz_that_unpacks_to_too_much_is_refused_before_it_does",
            "test_a_bomb_is_refused_by_its_size_before_it_is_unpacked",
            "test_a_header_that_claims_terabytes_is_refused_before_they_are_allocated",
        ),
    ),
    "D5": Row(
        "safetensors with names twice, 200,000 arrays, a huge header, wrong shapes, NaN",
        "exit 4 or 6 with the file and the array",
        (
            "test_a_safetensors_header_that_lies_is_refused",
            "test_a_header_of_90_mb_is_refused_before_it_is_read",
            "test_more_arrays_than_an_sae_has_are_refused",
            "test_weights_that_the_architecture_has_not_are_named",
            "test_shapes_that_do_not_fit_are_told_with_both",
            "test_weights_that_are_not_finite_are_counted",
        ),
    ),
    "D6": Row(
        "YAML that makes objects, unfolds a thousandfold or is nested without end",
        "exit 2; only plain values are read, without anchors, up to a depth and a size",
        (
            "test_yaml_that_could_run_code_or_explode_is_refused",
        ),
    ),
    "D7": Row(
        "a shared configuration that names classes or variables to fill in",
        "plain text, or no such key; nothing is made, imported or looked up",
        (
            "test_a_configuration_makes_no_objects_and_fills_in_no_variables",
        ),
    ),
    "D8": Row(
        "code that comes with a checkpoint",
        "never run",
        (
            "test_code_that_comes_with_a_checkpoint_is_not_run",
        ),
    ),
    "D9": Row(
        "names that leave their folder, links out of it, pipes in the place of files",
        "exit 8, or not taken for an SAE; never followed or opened",
        (
            "test_a_name_that_leaves_its_folder_is_refused",
            "test_a_pipe_in_the_place_of_weights_is_not_opened",
        ),
    ),
    "D10": Row(
        "any file of an SAE, damaged at random",
        "one of our errors, with the folder and the format; never another exception",
        (
            "test_three_hundred_damaged_files_raise_our_errors_alone",
            "test_two_thousand_damaged_files_raise_our_errors_alone",
        ),
    ),
    "D11": Row(
        "code in a setting, such as a dtype that is evaluated",
        "nothing from a file is evaluated or imported",
        ("test_nothing_from_a_file_is_run",),
    ),
    "F1": Row(
        "a judge's endpoint says 429, 5xx, times out, resets, cuts its answer off",
        "asked again by one layer, with growing waits; Retry-After is honoured; each item has one "
        "score",
        (
            "test_a_fault_that_passes_is_asked_again_by_one_layer",
            "test_retry_after_is_honoured_by_every_question",
            "test_the_waiting_for_one_question_ends",
            "test_with_thirty_faults_in_a_hundred_each_of_a_thousand_is_answered_once",
            "test_with_thirty_faults_in_a_hundred_each_of_ten_thousand_is_answered_once",
        ),
    ),
    "F2": Row(
        "no quota, a wrong key, a model that is gone",
        "exit 7 after one request, with what is safe and the line that resumes",
        (
            "test_what_does_not_pass_stops_at_once_and_says_how_to_go_on",
            "test_a_refused_run_keeps_what_came_and_goes_on_from_there",
        ),
    ),
    "F3": Row(
        "a judge's answer is no bare number from 1 to 10",
        "missing, its text kept; never 0",
        (
            "test_whatever_else_comes_is_unparsed_and_kept_and_never_0",
            "test_an_answer_that_was_cut_off_is_unparsed_even_if_it_is_a_number",
            "test_answers_that_are_no_rating_are_missing_and_kept",
        ),
    ),
    "F4": Row(
        "a judged run is killed",
        "the same command asks only what was under way",
        (
            "test_a_killed_run_asks_again_only_what_was_under_way",
            "test_a_run_killed_thirty_times_asks_again_only_what_was_under_way",
        ),
    ),
    "F5": Row(
        "a text to be judged instructs the judge",
        "it stands between marks that it cannot close; a judge that obeys is reported",
        (
            "test_no_text_closes_its_own_mark",
            "test_a_judge_that_obeys_the_text_is_reported",
        ),
    ),
    "F6": Row(
        "scores are missing",
        "the mean has its n and its bounds; no picture under 95 % of them",
        (
            "test_missing_scores_are_left_out_of_the_mean_and_bound_it",
            "test_ten_in_a_hundred_missing_bound_the_mean_and_draw_no_picture",
        ),
    ),
    "F7": Row(
        "judging costs money",
        "the estimate comes first, and a limit is never passed",
        (
            "test_the_estimate_is_said_before_the_first_question",
            "test_a_dear_run_is_refused_before_the_first_question",
            "test_money_is_never_spent_beyond_its_limit",
        ),
    ),
    "G1": Row(
        "a token of the hub in a message, a log or a file",
        "struck out by its value and by its shape",
        (
            "test_no_fault_brings_the_token_into_a_message_a_log_line_or_a_file",
            "test_no_token_stands_in_anything_a_failing_command_writes",
            "test_an_error_and_a_log_line_that_hold_a_token_are_printed_without_it",
            "test_the_key_is_in_no_message_log_file_or_repr",
        ),
    ),
    "G2": Row(
        "a token in a file that git tracks, or on the command line",
        "a warning; there is no such option",
        (
            "test_a_dotenv_that_git_tracks_is_warned_of",
            "test_no_command_takes_a_token_as_an_argument",
        ),
    ),
}  # fmt: skip


def tests_there_are() -> set[str]:
    """Return the names of all test functions below this folder."""
    found = set()
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.add(node.name)
    return found


def sentence(name: str) -> str:
    """Return a test's name as the sentence it is."""
    return name.removeprefix("test_").replace("_", " ")


def table() -> str:
    """Return the rows as a Markdown table."""
    lines = ["| | what goes wrong | what happens | proven by |", "|---|---|---|---|"]
    for name, row in ROWS.items():
        proofs = "<br>".join(f"{sentence(test)}" for test in row.tests)
        left = f"{'<br>' if proofs else ''}*open: {row.open}*" if row.open else ""
        lines.append(f"| {name} | {row.failure} | {row.answer} | {proofs}{left} |")
    return "\n".join(lines)


def page_with_table(text: str) -> str:
    """Return a page with the table between its markers."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())
