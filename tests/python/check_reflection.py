"""Every kind of call, through reflection alone. usage: check_reflection.py ADDRESS (a server with a preference model)"""

import sys

import grpc

from plumb_reflection import Server


def main():
    server = Server(sys.argv[1])
    services = server.services()
    for name in ("Preference", "Generation", "Models", "Tokens"):
        assert f"plumb.v1.{name}" in services, services
    assert "grpc.health.v1.Health" in services, services

    assert server("grpc.health.v1.Health/Check", {})["status"] == "SERVING"
    text = {"text": "A good answer."}
    alone = server("plumb.v1.Preference/Score", {"items": [text]})
    both = server("plumb.v1.Preference/Score", {"items": [{"text": "Something else entirely."}, text]})
    rewards = [result["score"]["reward"] for result in both["results"]]
    assert rewards[1] == alone["results"][0]["score"]["reward"], "a score depends on its neighbour"
    assert alone["model"]["weights_digest"], alone

    prompt = {"conversation": {"messages": [{"role": "user", "content": "Which is best?"}]}}
    ranked = server(
        "plumb.v1.Preference/Rank",
        {"prompt": prompt, "candidates": [{"text": "This."}, {"text": "That."}, {"text": "Neither of them."}]},
    )["ranked"]
    assert [r["rank"] for r in ranked] == [1, 2, 3], ranked
    assert sorted(r["index"] for r in ranked) == [0, 1, 2], ranked

    rendered = server("plumb.v1.Tokens/Render", {"input": prompt, "add_generation_prompt": True})
    assert rendered["token_ids"] and len(rendered["template_sha256"]) == 64, rendered
    models = server("plumb.v1.Models/ListModels", {})["models"]
    assert any(model["state"] == "MODEL_STATE_AVAILABLE" for model in models), models
    try:
        server("plumb.v1.Preference/Score", {})
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    else:
        raise AssertionError("a request without items was accepted")
    print("reflection: all calls answered")


main()
