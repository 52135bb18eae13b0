"""`cloc-mllm push`: upload a folder to the hub."""

from __future__ import annotations

import argparse

EPILOG = """\
example:
  cloc-mllm push checkpoints/instruct/export me/my-mllm --private --dry-run

Log in first (hf auth login, or HF_TOKEN). HF_ENDPOINT names another hub. All files go up in one commit."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "push",
        help="upload a checkpoint, an adapter or an export to the hub",
        description="Upload a checkpoint, an adapter or an export to the hub.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="what to upload: export/ or adapter/ of a run, or an export")
    parser.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME, made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded, and ask the hub nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Upload, and print the files and the commit."""
    from cloc_mllm.apps.hub import push

    done = push(args.folder, args.repo_id, private=args.private, dry_run=args.dry_run)
    for name, size in done.files.items():
        print(f"{size:>15,}  {name}")
    total = sum(done.files.values())
    print(f"{total:>15,}  bytes in {len(done.files)} files: {done.url or 'not uploaded (dry run)'}")
    return 0
