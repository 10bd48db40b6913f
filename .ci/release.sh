#!/usr/bin/env bash
# release.sh VERSION: makes a release ready: version, changelog, citation, sdist and wheel, their check, the tag.
# It stops short of uploading and pushing, and prints the two commands that do it.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?release.sh VERSION, as 0.2.0}
tools=.cache/release # build and twine, which bring 25 packages, are kept out of the environment of work
fail() { echo "release: $1" >&2; exit 2; }

[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+((a|b|rc)[0-9]+)?$ ]] || fail "$version is no version, as 0.2.0 or 0.2.0rc1"
[ -z "$(git status --porcelain --untracked-files=no)" ] || fail "commit or stash your changes first"
! git rev-parse -q --verify "refs/tags/v$version" >/dev/null || fail "the tag v$version exists"
sed -n '/^## Unreleased/,/^## [0-9]/p' CHANGELOG.md | grep -q '^- ' || fail "CHANGELOG.md has nothing under Unreleased"
if [ ! -x $tools/bin/twine ]; then
  "${PYTHON:-python3.11}" -m venv $tools
  $tools/bin/pip install -q --disable-pip-version-check build==1.6.1 twine==7.0.0
fi

sed -i "s/^__version__ = .*/__version__ = \"$version\"/" amclip_ds/__init__.py
sed -i "s/^version: .*/version: $version/" CITATION.cff
sed -i "s/^## Unreleased$/## Unreleased\n\n## $version - $(date -u +%Y-%m-%d)/" CHANGELOG.md
rm -rf dist
$tools/bin/python -m build --outdir dist . >/dev/null
$tools/bin/python -m twine check --strict dist/*
git commit -qam "release: $version"
git tag -a "v$version" -m "amclip_ds $version"
echo "release: dist/ holds $(ls dist | tr '\n' ' ')and v$version is tagged, nothing has left this machine; to publish:"
echo "  git push origin HEAD v$version"
echo "  $tools/bin/python -m twine upload dist/*"
