"""The process and the disk."""

from failures.row import Row

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
            "test_a_flipped_byte_is_told_by_the_latents_of_its_block_and_by_verify",
            "test_any_flipped_byte_of_the_head_is_told_whatever_is_asked",
            "test_the_whole_index_of_another_store_is_not_read",
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
}  # fmt: skip
