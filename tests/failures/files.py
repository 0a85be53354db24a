"""Files from outside: those that are read, and those that are not trusted."""

from failures.row import Row

ROWS = {
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
}  # fmt: skip
