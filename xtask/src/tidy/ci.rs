//! Rules for continuous integration: its workflows are YAML of the right form, and they run the same
//! commands that a developer runs.

use super::{Problem, Repo};
use yaml_rust2::{Yaml, YamlLoader};

const WORKFLOWS: &str = ".github/workflows/";
const ENTRY: &str = ".ci/run";
const MAKEFILE: &str = "Makefile";

/// What the workflows together must run.
const REQUIRED: &[&str] = &[ENTRY, "make demo"];

/// Every workflow parses, has jobs of steps, and calls only commands that exist; the required ones are
/// called, and `.ci/run` runs `make test`, whatever it does besides.
pub(super) fn workflows_run_our_commands(repo: &Repo) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut commands = Vec::new();
    let workflows = repo.files.iter().filter(|(path, _)| path.starts_with(WORKFLOWS));
    for (path, text) in workflows {
        match steps(text) {
            Ok(found) => commands.extend(found.into_iter().map(|command| (path.as_str(), command))),
            Err(message) => problems.push(Problem::new(path, 0, message)),
        }
    }
    for (path, command) in &commands {
        if let Some(name) = command.strip_prefix("make ")
            && !makes(repo, name.trim())
        {
            problems.push(Problem::new(path, 0, format!("`{MAKEFILE}` has no target `{name}`")));
        }
        let script = command.split_whitespace().next().unwrap_or("").trim_start_matches("./");
        if script.contains('/') && !repo.files.contains_key(script) {
            problems.push(Problem::new(path, 0, format!("there is no `{script}`")));
        }
    }
    for required in REQUIRED {
        if !commands.iter().any(|(_, command)| command == required) {
            problems.push(Problem::new(WORKFLOWS, 0, format!("no workflow runs `{required}`")));
        }
    }
    if !repo.text(ENTRY).is_some_and(|text| text.lines().any(|line| line == "make test")) {
        problems.push(Problem::new(ENTRY, 0, "must run `make test`"));
    }
    problems
}

fn makes(repo: &Repo, target: &str) -> bool {
    let rule = format!("{target}:");
    repo.text(MAKEFILE).is_some_and(|text| text.lines().any(|line| line.starts_with(&rule)))
}

/// The lines of all `run:` steps of a workflow.
fn steps(text: &str) -> Result<Vec<String>, String> {
    let documents = YamlLoader::load_from_str(text).map_err(|e| format!("is not YAML: {e}"))?;
    let [workflow] = documents.as_slice() else { return Err("is not one document".into()) };
    if workflow["on"].is_badvalue() {
        return Err("has no `on`".into());
    }
    let jobs = workflow["jobs"].as_hash().ok_or("has no `jobs`")?;
    let mut lines = Vec::new();
    for (name, job) in jobs {
        let name = name.as_str().unwrap_or("?");
        if job["runs-on"].as_str().is_none() {
            return Err(format!("job `{name}` has no `runs-on`"));
        }
        let steps = job["steps"].as_vec().filter(|steps| !steps.is_empty());
        for step in steps.ok_or(format!("job `{name}` has no `steps`"))? {
            match (&step["run"], &step["uses"]) {
                (Yaml::String(run), Yaml::BadValue) => {
                    lines.extend(run.lines().map(|line| line.trim().to_owned()));
                }
                (Yaml::BadValue, Yaml::String(_)) => {}
                _ => return Err(format!("a step of job `{name}` needs one of `run` and `uses`")),
            }
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "on: [push]\njobs:\n  test:\n    runs-on: x\n    steps:\n      - uses: a@v4\n      \
                        - run: .ci/run\n      - run: |\n          make demo\n          make lint\n";

    fn messages(workflow: &str, makefile: &str) -> Vec<String> {
        let repo = Repo::of(&[
            (".github/workflows/ci.yml", workflow),
            (ENTRY, "#!/bin/sh\nmake test\n"),
            (MAKEFILE, makefile),
        ]);
        workflows_run_our_commands(&repo).into_iter().map(|p| p.message).collect()
    }

    #[test]
    fn a_workflow_of_our_commands_passes() {
        assert_eq!(messages(GOOD, "demo: ## x\nlint:\n"), [""; 0]);
    }

    #[test]
    fn what_is_not_there_is_found() {
        assert_eq!(messages(GOOD, "demo:\n"), ["`Makefile` has no target `lint`"]);
        let other = GOOD.replace(".ci/run", ".ci/walk");
        assert_eq!(
            messages(&other, "demo:\nlint:\n"),
            ["there is no `.ci/walk`", "no workflow runs `.ci/run`"]
        );
    }

    #[test]
    fn an_entry_without_the_tests_is_found() {
        let repo = Repo::of(&[
            (".github/workflows/ci.yml", GOOD),
            (ENTRY, "#!/bin/sh\n# make test\nmake lint\n"),
            (MAKEFILE, "demo:\nlint:\n"),
        ]);
        let found = workflows_run_our_commands(&repo).into_iter().map(|p| p.message);
        assert_eq!(found.collect::<Vec<_>>(), ["must run `make test`"]);
    }

    #[test]
    fn broken_workflows_are_found() {
        for (from, to, message) in [
            ("steps:", "step:", "has no `steps`"),
            ("on: [push]", "on: [push", "is not YAML"),
            ("    runs-on: x\n", "", "has no `runs-on`"),
            ("- uses: a@v4", "- name: a", "needs one of `run` and `uses`"),
        ] {
            let found = messages(&GOOD.replace(from, to), "demo:\nlint:\n").join("; ");
            assert!(found.contains(message), "{found}");
        }
    }
}
