from fastapi import APIRouter
def dashboard_routes(s):
    return APIRouter()
