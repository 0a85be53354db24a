"""Judges that are asked, and secrets."""

from failures.row import Row

ROWS = {
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
