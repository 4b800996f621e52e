// Before a merge is sent: its task gets a number, by which the web UI's own progress bar follows it.
window.oft_merge = (...inputs) => {
    const task = randomId();
    const panel = gradioApp().querySelector("#oft_merge_results");
    requestProgress(task, panel, null, () => {});
    return [task, ...create_submit_args(inputs).slice(1)];
};
