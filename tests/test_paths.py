"""What a model's card says of the command that made it: nothing of the machine's folders."""

import pytest

from train.report.paths import public_command, public_name


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("/home/ada/pets", "pets"),
        ("../pets/", "pets"),
        ("wds//mnt/shards", "wds/shards"),
        ("hfds//mnt/set", "hfds/set"),
        ("hfds/user/flowers", "hfds/user/flowers"),
        ("hf:user/model", "hf:user/model"),
        ("convmixer_256_8_cifar10", "convmixer_256_8_cifar10"),
        ("~/x/model.safetensors", "model.safetensors"),
        ("", ""),
    ],
)
def test_a_path_is_its_last_part(name, public):
    assert public_name(name) == public


def test_a_command_keeps_all_but_the_folders():
    typed = "--recipe finetune --data /a/b --out=/c/d --weights ~/e/f.pth --resume --class_names /g/h.txt --lr 0.1"
    expected = "--recipe finetune --data b --out=d --weights f.pth --class_names h.txt --lr 0.1"
    assert public_command(typed.split()) == f"python train/run.py {expected}"
