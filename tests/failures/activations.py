"""Activations and models."""

from failures.row import Row

ROWS = {
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
}  # fmt: skip
